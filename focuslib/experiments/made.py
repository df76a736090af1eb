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
from focuslib.experiments.store import read_status
from focuslib.files import digest, write_json
from focuslib.paths import params_folder, project_root

DRAWN_WITH = ("matplotlib", "pandas", "papermill", "seaborn")
SHARING = ("workers", "engine", "address", "shard")  # who answers changes no answer
READS = {"dse": "main.index", "hardware": "*.index"}  # whose results a notebook shows beside its own


def as_made(experiment: str, folder: Path, params: dict[str, Any], cells: list[Cell]) -> bool:
    """Whether a results folder has the notebook, whole, of these parameters, sources and results, and all its files."""
    try:
        made = json.loads(_file(folder, experiment).read_text())
        status = read_status(folder, experiment)
        same = made["from"] == _sources(experiment, folder, params, cells) and made["cells"] == status["cells"]
        whole = status["complete"] and all((folder / name).exists() for name in made["files"])
    except (OSError, ValueError, KeyError, TypeError, UserError):  # a checkpoint that is not there any more, say
        return False
    return whole and same


def note_made(experiment: str, folder: Path, params: dict[str, Any], cells: list[Cell]) -> None:
    """Note of what a notebook has just been made, and the files that it left."""
    names = read_status(folder, experiment)["cells"]
    tables = [path.relative_to(folder).as_posix() for path in (*folder.glob("*.csv"), *folder.glob("*/*.pth"))]
    files = [f"{experiment}.ipynb", *(f"cells/{name}" for name in names), *sorted(tables)]
    made = {"from": _sources(experiment, folder, params, cells), "cells": names, "files": files}
    write_json(_file(folder, experiment), made)


def forget_made(experiment: str, folder: Path) -> None:
    """The notebook is about to be made: what is noted of it does not hold any more."""
    _file(folder, experiment).unlink(missing_ok=True)


def _file(folder: Path, experiment: str) -> Path:
    return folder / "cells" / f"{experiment}.made"


def _sources(experiment: str, folder: Path, params: dict[str, Any], cells: list[Cell]) -> str:
    """A digest of all that decides what a notebook shows: what it is made of, and the results of others it reads."""
    names = sorted(cell.name() for cell in cells)
    read = (folder / "cells").glob(READS[experiment]) if experiment in READS else ()
    results = {name for path in read for name in json.loads(path.read_text())["cells"]}
    others = [[name, _digest(folder / "cells" / name)] for name in sorted(results)]
    decides = {name: value for name, value in params.items() if name not in SHARING}
    packages = package_versions(*DRAWN_WITH)
    return digest([_texts(experiment), decides, names, others, packages, platform.node(), platform.machine()])


def _digest(path: Path) -> str:
    """Of a file's bytes; of a file that is not there, nothing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _texts(experiment: str) -> list[list[str]]:
    """The notebook, the package, the methods' settings and the published inputs: file → digest of its bytes."""
    package, published = Path(focuslib.__file__).parent, params_folder() / "published"
    files = [project_root() / "notebooks" / f"{experiment}.ipynb", params_folder() / "methods.yaml"]
    for place in (package, published):
        files += sorted(path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [[path.name, _digest(path)] for path in files]
