"""One self-contained HTML page of a profile's executed notebooks: no file beside it, nothing loaded from a network."""

import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from focuslib.errors import UserError
from focuslib.experiments.params import EXPERIMENTS


def write_report(folder: Path) -> Path:
    """Write folder/report.html of the notebooks in a results folder. Raises UserError if none has been run."""
    paths = [path for name in EXPERIMENTS if (path := folder / f"{name}.ipynb").exists()]
    if not paths:
        raise UserError(f"{folder}: no executed notebooks; run make reproduce first")
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    whole = nbformat.v4.new_notebook(metadata={**notebooks[0].metadata, "title": f"focuslib: {folder.name}"})
    contents = [f"- [{_title(notebook)}](#{_anchor(_title(notebook))})" for notebook in notebooks]
    whole.cells = [nbformat.v4.new_markdown_cell(f"# Results of the profile {folder.name}\n\n" + "\n".join(contents))]
    for name, notebook in zip((path.stem for path in paths), notebooks, strict=True):
        for number, cell in enumerate(notebook.cells):
            cell.id = f"{name}-{number}"
            whole.cells.append(cell)
    # mathjax and require are for formulas and widgets, of which there are none; both would come from a network
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", embed_images=True)
    body = exporter.from_notebook_node(whole)[0]
    body = re.sub(r'<script[^>]*\ssrc="[^"]*"[^>]*>\s*</script>', "", body)
    target = folder / "report.html"
    partial = target.with_name("report.html.partial")
    partial.write_text(body, encoding="utf-8")
    partial.replace(target)
    return target


def _title(notebook: nbformat.NotebookNode) -> str:
    """The first heading."""
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "Notebook")


def _anchor(title: str) -> str:
    return title.replace(" ", "-")
