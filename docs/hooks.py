"""MkDocs hooks: notebooks become pages where they lie, and pages are held to what the code says."""

import ast
import logging
import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks.focuslib")
ROOT = Path(__file__).parent.parent
EXECUTED = "results/expected/laptop"
TITLES = {
    "main": "Focus against dense",
    "baselines": "Five methods",
    "methods": "Methods and controls",
    "curves": "Curves",
    "dse": "Design space",
    "int8": "INT8",
    "image": "Images",
    "hardware": "Hardware",
}
# page, which is also the notebook's path in the repository → title; those that are not there are left out
PAGES = {f"{EXECUTED}/{name}.ipynb": title for name, title in TITLES.items()}
PAGES = {page: title for page, title in PAGES.items() if (ROOT / page).is_file()}


def on_config(config):
    """Put the executed notebooks into the navigation."""
    results = next(part["Results"] for part in config.nav if "Results" in part)
    results += [{title: page} for page, title in PAGES.items()]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    """Add the notebooks to the site's files."""
    for page in (*PAGES, "notebooks/extend.ipynb"):
        files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what pages leave to the tree: the executed notebooks, and a room's modules.

    Warns (an error under --strict) where a method's page names settings that are not the code's.
    """
    name = page.file.src_uri
    if (match := re.fullmatch(r"methods/(\w+)\.md", name)) and match[1] not in ("index", "dense", "controls"):
        written = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", markdown, re.MULTILINE))
        if written != (known := settings(match[1])):
            differing = sorted(key for key in written | known if written.get(key) != known.get(key))
            log.warning("%s: the settings %s are not those of focuslib/%s", name, ", ".join(differing), name)
    links = "\n".join(f"- [{title}](expected/laptop/{Path(path).name})" for path, title in PAGES.items())
    markdown = markdown.replace("{{ notebooks }}", links)
    return re.sub(r"\{\{ room (\w+) \}\}", lambda match: room(match[1]), markdown)


def on_page_content(html, page, config, files):
    """Take widgets, which load scripts from the network, out of notebooks, and leave room for their wide tables."""
    if page.file.src_uri.endswith(".ipynb"):
        page.meta["hide"] = ["toc"]
        html = re.sub(r'<script type="application/vnd\.jupyter\.widget-.*?</script>', "", html, flags=re.DOTALL)
        return re.sub(r"<script>(?:(?!</script>).)*addWidgetsRenderer.*?</script>", "", html, flags=re.DOTALL)
    return html


def room(name):
    """The reference of a room: what its package says, then each module."""
    folder = ROOT / "focuslib" / name
    summary = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return "\n\n".join([summary.partition("\n\n")[0], *(f"::: focuslib.{name}.{module}" for module in modules)])


def settings(method):
    """A method's settings and their defaults as Python writes them, from its source."""
    tree = ast.parse((ROOT / "focuslib" / "methods" / f"{method}.py").read_text())
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    (chosen,) = (node for node in classes if any(ast.unparse(base) == "Method" for base in node.bases))
    return {
        node.target.id: ast.unparse(node.value)
        for node in chosen.body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    }
