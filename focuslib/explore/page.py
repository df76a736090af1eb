"""A view as HTML that needs no kernel and no network, and as a picture for viewers that run no scripts."""

import html
import io
import json
import uuid
from pathlib import Path
from typing import Any

from focuslib.explore.figure import view_figure
from focuslib.explore.view import ViewData

STATIC = Path(__file__).parent / "static"
SCRIPT, STYLE = (STATIC / "explore.js").read_text(), (STATIC / "explore.css").read_text()

_SNIPPET = """<div id="{id}">The interactive view needs JavaScript (in JupyterLab: trust the notebook).</div>
<style>{css}</style>
<script>(() => {{
{script}
const bytes = Uint8Array.from(atob("{data}"), (letter) => letter.charCodeAt(0));
readView(bytes).then((view) => mountExplorer(document.getElementById("{id}"), view, {state}));
}})();</script>"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title></head>
<body style="margin: 12px; display: grid; justify-content: center; grid-template-columns: minmax(0, 1256px)">
{snippet}</body></html>
"""


def view_html(data: ViewData, state: dict[str, Any] | None = None) -> str:
    """A self-contained piece of HTML that shows a view without a kernel or a network."""
    return _SNIPPET.format(
        id=f"fx-{uuid.uuid4().hex[:12]}", css=STYLE, script=SCRIPT, data=data.base64(), state=json.dumps(state or {})
    )


def view_png(data: ViewData, state: dict[str, Any] | None = None) -> bytes:
    """A picture of a view, for viewers that run no scripts."""
    file = io.BytesIO()
    view_figure(data, state).savefig(file, format="png", dpi=100)
    return file.getvalue()


def page_html(title: str, snippet: str) -> str:
    """A whole page around a view's piece of HTML."""
    return _PAGE.format(title=html.escape(title), snippet=snippet)
