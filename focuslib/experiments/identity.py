"""What decides a result beside a cell's settings and data: the source it runs through, and the packages."""

from __future__ import annotations

import ast
from functools import cache
from importlib.metadata import version
from pathlib import Path

import focuslib
from focuslib.files import digest

ROOMS = ("kernels", "prefill", "models", "methods", "evaluation", "tasks")  # what a question runs through
PACKAGES = ("torch", "transformers", "lmms-eval")  # whose versions can change an answer


@cache
def source_digest(*more: str) -> str:
    """A digest of the code that an answer runs through. Comments, docstrings and layout do not count.

    more: rooms that a result runs through as well.
    """
    package = Path(focuslib.__file__).parent
    files = [package / "errors.py", package / "grid.py", package / "experiments" / "single.py"]
    for room in (*ROOMS, *more):
        files += sorted((package / room).rglob("*.py"))
    tasks = sorted(file for file in (package / "tasks").rglob("*") if file.name.endswith("yaml"))
    parts = [[str(file.relative_to(package)), _code(file.read_text(encoding="utf-8"))] for file in files]
    return digest([*parts, *([file.name, file.read_text(encoding="utf-8")] for file in tasks)])


def _code(text: str) -> str:
    """A Python file as its syntax tree, without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


@cache
def package_versions(*more: str) -> dict[str, str]:
    """The versions of the packages that can change an answer. more: further packages that take part."""
    return {name: version(name) for name in (*PACKAGES, *more)}
