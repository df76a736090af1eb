"""What was found of a cell becomes its result, with where and with what it was made."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import focuslib
from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.experiments.cell import Cell
from focuslib.experiments.single import median_sample
from focuslib.experiments.store import CellResult, read_result, result_file, work_folder
from focuslib.files import write_json
from focuslib.models import VLM
from focuslib.models.quantize import linear_layers

Settled = tuple[Cell, bool, str | None]  # a cell, whether it was run now, and one line on why it has no result


def resume(cell: Cell, folder: Path) -> Settled | None:
    """A cell that is settled without running it: it has a whole result, or lacks its checkpoint."""
    try:
        path = result_file(cell, folder)
    except UserError as error:
        return cell, False, str(error)
    if not path.exists() or read_result(path).unreadable:
        return None
    shutil.rmtree(work_folder(path), ignore_errors=True)  # there if the run was killed right after its result
    return cell, False, None


def unsettled(cells: Iterable[Cell], folder: Path, left: list[Cell]) -> Iterator[Settled]:
    """Settle the cells that have a result, or lack what they need; all others are added to `left`. Makes their data."""
    problems: dict[str, str | None] = {}  # data set → why there is none
    for cell in cells:
        if settled := resume(cell, folder):
            yield settled
            continue
        if cell.dataset not in problems:
            problems[cell.dataset] = _prepare(cell.dataset)
        if why := problems[cell.dataset]:
            yield cell, False, why
        else:
            left.append(cell)


def _prepare(name: str) -> str | None:
    """Have a data set make its data; returns why it could not."""
    try:
        DATASETS[name].prepare()
    except (OSError, UserError) as error:  # no place for the data, say
        return f"{name}: its data could not be made ({error})"
    return None


def one_line(error: Exception) -> str:
    """Why a cell has no result, in a line; a fault that no user made shows its traceback too."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def write_result(cell: Cell, path: Path, content: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write a cell's result; what the cell kept until then goes. content: of CellResult, but for the provenance."""
    nothing: dict[str, Any] = {"score": None, "samples": [], "failures": []}
    result = CellResult(cell, provenance=provenance, **{**nothing, **content})
    write_json(path, asdict(result))
    if not result.unreadable:  # else the next run goes on from here
        shutil.rmtree(work_folder(path), ignore_errors=True)


def choose_trace(cell: Cell, path: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the trace of the median sample, or of the one that the cell names, beside the result; none of other cells."""
    if cell.kind != "trace":
        return {}
    median = cell.sample
    if median is None:
        median = median_sample(samples)
    elif "error" in samples[median]:
        raise UserError(f"question {median}, whose trace is wanted, was not answered: {samples[median]['error']}")
    name = f"{path.stem}.trace"
    whole, partial = path.parent / name, path.parent / f"{name}.partial"
    shutil.copyfile(trace_file(path, samples[median]["task"], samples[median]["doc_id"]), partial)
    partial.replace(whole)
    return {"median_index": median, "trace": name}


def trace_file(path: Path, task: str, doc_id: int) -> Path:
    """Where a cell keeps one sample's trace until it has its result."""
    return work_folder(path) / f"{task}_{doc_id}.trace"


def describe_run(vlm: VLM, cell: Cell) -> dict[str, Any]:
    """The provenance of what a model gives, but for the seconds."""
    return {**describe_machine(cell.device), "linear_layers": linear_layers(vlm.model)}


def describe_machine(device: str) -> dict[str, Any]:
    """Where and with what a result was made."""
    here, describe = Path(focuslib.__file__).parent, ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {
        "packages": {name: version(name) for name in ("torch", "transformers", "lmms-eval", "numpy")},
        "python": platform.python_version(),
        "git": git or None,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "cores": os.cpu_count(),
    }
