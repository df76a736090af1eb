"""Which executed notebooks are what a new run would make again, so that it can leave them as they are."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import focuslib
from focuslib.errors import UserError
from focuslib.experiments.cell import Cell
from focuslib.experiments.identity import package_versions
from focuslib.experiments.store import read_result, read_status
from focuslib.files import digest, write_json
from focuslib.paths import params_folder, project_root

DRAWN_WITH = ("matplotlib", "pandas", "papermill", "seaborn")
SHARING = ("workers", "engine", "address", "shard")  # who answers changes no answer


def as_made(experiment: str, folder: Path, params: dict[str, Any], cells: list[Cell]) -> bool:
    """Whether a results folder has the notebook, whole, of these parameters, sources and results, and all its files."""
    try:
        made = json.loads(_file(folder, experiment).read_text())
        whole = read_status(folder, experiment)["complete"]
        same = made["from"] == _sources(experiment, folder, params, cells)
    except (OSError, ValueError, KeyError, UserError):  # a checkpoint that is not there any more, say
        return False
    return whole and same and all((folder / name).exists() for name in made["files"])


def note_made(experiment: str, folder: Path, params: dict[str, Any], cells: list[Cell]) -> None:
    """Note of what a notebook has just been made, and the files that it left.

    Not where something failed that the next run tries again.
    """
    names = read_status(folder, experiment)["cells"]
    if any(read_result(folder / "cells" / name).failures for name in names):
        return
    results = [f"cells/{name}" for name in names]
    tables = [path.relative_to(folder).as_posix() for path in (*folder.glob("*.csv"), *folder.glob("*/*.pth"))]
    files = [f"{experiment}.ipynb", *results, *sorted(tables)]
    write_json(_file(folder, experiment), {"from": _sources(experiment, folder, params, cells), "files": files})


def _file(folder: Path, experiment: str) -> Path:
    return folder / "cells" / f"{experiment}.made"


def _sources(experiment: str, folder: Path, params: dict[str, Any], cells: list[Cell]) -> str:
    """A digest of all that decides what a notebook shows. One without cells reads those of the others."""
    names = sorted(cell.name() for cell in cells)
    others = [] if cells else sorted(path.name for path in (folder / "cells").glob("*.json"))
    decides = {name: value for name, value in params.items() if name not in SHARING}
    packages = package_versions(*DRAWN_WITH)
    return digest([_texts(experiment), decides, names, others, packages, platform.node(), platform.machine()])


def _texts(experiment: str) -> list[list[str]]:
    """The notebook, the package, the methods' settings and the published inputs: file → digest of its bytes."""
    package, published = Path(focuslib.__file__).parent, params_folder() / "published"
    files = [project_root() / "notebooks" / f"{experiment}.ipynb", params_folder() / "methods.yaml"]
    for place in (package, published):
        files += sorted(path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
