"""Run cells: those that have no result yet, one after another or in processes, each resumed where it was stopped."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import focuslib
from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import evaluate
from focuslib.evaluation.sources import require
from focuslib.experiments.cell import Cell
from focuslib.experiments.pool import process_pool
from focuslib.experiments.progress import over_cells
from focuslib.experiments.single import measure_cost, median_sample, record_view
from focuslib.experiments.store import (
    CellResult,
    Outcome,
    claimed,
    export_traces,
    pth_name,
    read_result,
    result_file,
    work_folder,
    write_status,
)
from focuslib.files import write_json
from focuslib.methods.settings import make_method
from focuslib.models import VLM, load_vlm
from focuslib.models.quantize import linear_layers


def run_cells(
    experiment: str, cells: Iterable[Cell], folder: Path, trace_folder: Path | None = None, workers: int = 1
) -> Outcome:
    """Run the cells that have no result yet; one that fails is reported and the others go on.

    A result with questions whose media could not be read is run once more, asking only those.
    workers: processes that share the cells; with the device "cuda", each takes a GPU of its own.
    Writes folder/cells/*.json, the list of the experiment's cells and what became of them
    (folder/cells/<experiment>.index), and the simulator's traces trace_folder/<model>_<dataset>.pth.
    """
    outcome = Outcome(folder)
    cells = list(dict.fromkeys(cells))
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for cell, ran, why in over_cells(_settle(cells, folder, workers), len(cells), experiment):
        outcome.ran += ran
        if why:
            outcome.failed[cell] = why
    for cell in cells:
        if cell not in outcome.failed:
            # the same checkpoint may have been at another path when the result was written
            outcome.results.append(replace(read_result(result_file(cell, folder)), cell=cell))
    if trace_folder:
        traces = [result.cell for result in outcome.results if result.cell.kind == "trace"]
        export_traces(outcome, [(cell, trace_folder / pth_name(cell)) for cell in traces])
    write_status(folder, experiment, outcome.results, outcome.complete, outcome.summary())
    return outcome


Settled = tuple[Cell, bool, str | None]  # a cell, whether it was run now, and one line on why it has no result


def _settle(cells: list[Cell], folder: Path, workers: int) -> Iterator[Settled]:
    """See to it that every cell has a result, those first that have one already."""
    left = []
    for cell in cells:
        settled = _resume(cell, folder)
        if settled:
            yield settled
        else:
            left.append(cell)
    for name in dict.fromkeys(cell.dataset for cell in left):
        try:
            DATASETS[name].prepare()
        except (OSError, UserError) as error:  # no place for the data, say
            why = f"{name}: its data could not be made ({error})"
            yield from ((cell, False, why) for cell in left if cell.dataset == name)
            left = [cell for cell in left if cell.dataset != name]
    alone = [cell for cell in left if cell.kind == "cost"]  # timed on a machine that does nothing else
    together = [cell for cell in left if cell.kind != "cost"]
    if min(workers, len(together)) > 1:
        yield from _spread(together, folder, workers)
        left = alone
    else:
        left = together + alone
    loaded = _Loader()
    for cell in left:
        yield cell, *_attempt(cell, folder, loaded)


def _resume(cell: Cell, folder: Path) -> Settled | None:
    """A cell that is settled without running it: it has a whole result, or lacks its checkpoint."""
    try:
        path = result_file(cell, folder)
    except UserError as error:
        return cell, False, str(error)
    if not path.exists() or read_result(path).unreadable:
        return None
    shutil.rmtree(work_folder(path), ignore_errors=True)  # there if the run was killed right after its result
    return cell, False, None


def _spread(cells: list[Cell], folder: Path, workers: int) -> Iterator[Settled]:
    """Run cells in processes, as they come to an end.

    When a process dies, its pool is lost. What is left then runs in a process a cell, so that only the fatal one fails.
    """
    lost = []
    with process_pool(min(workers, len(cells))) as pool:
        futures = {pool.submit(_attempt_in_worker, cell, folder): cell for cell in cells}
        for future in as_completed(futures):
            try:
                yield futures[future], *future.result()
            except BrokenProcessPool:
                lost.append(futures[future])
    if lost and len(cells) == 1:
        yield cells[0], False, "its process died, perhaps for want of memory; run again, with fewer workers"
        return
    for cell in lost:
        yield from _spread([cell], folder, 1)


def _attempt(cell: Cell, folder: Path, loaded: _Loader) -> tuple[bool, str | None]:
    """Run a cell. Returns whether it has a result now, and else why not."""
    try:
        path = result_file(cell, folder)
        with claimed(path):
            if _resume(cell, folder):  # another process was at it
                return False, None
            _run(cell, path, loaded)
    except UserError as error:
        return False, str(error)
    except Exception as error:  # an unforeseen fault must not cost the other cells
        traceback.print_exc()
        return False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return True, None


def _attempt_in_worker(cell: Cell, folder: Path) -> tuple[bool, str | None]:
    return _attempt(cell, folder, _worker_loader())


@cache
def _worker_loader() -> _Loader:
    """The loader of this process, which keeps its model from cell to cell."""
    return _Loader()


class _Loader:
    """Keeps one model in memory; a checkpoint that could not be loaded is not tried again."""

    def __init__(self):
        self.loaded: tuple[tuple, VLM] | None = None  # key, model
        self.errors: dict[tuple, UserError] = {}

    def __call__(self, cell: Cell) -> VLM:
        key = (cell.model, cell.checkpoint, cell.device, cell.dtype, cell.quantization, cell.frames, cell.fps)
        if key in self.errors:
            raise self.errors[key]
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None
            gc.collect()
            try:
                self.loaded = key, load_cell(cell)
            except UserError as error:
                self.errors[key] = error.with_traceback(None)  # which would keep what was loaded so far
                raise
        return self.loaded[1]


def load_cell(cell: Cell) -> VLM:
    """The model a cell runs on, as it runs on it."""
    return load_vlm(
        cell.model, cell.checkpoint, device=cell.device, dtype=cell.dtype, quantization=cell.quantization,
        frames=cell.frames, fps=cell.fps,
    )  # fmt: skip


def _run(cell: Cell, path: Path, loaded: _Loader) -> None:
    """Run one cell and write its result."""
    require(DATASETS[cell.dataset])  # before a model is loaded in vain
    vlm = loaded(cell)
    start = time.time()
    content = _look(cell, path, vlm) if cell.kind in ("cost", "view") else _score(cell, path, vlm)
    provenance = {
        **describe_machine(cell.device),
        "seconds": time.time() - start,
        "linear_layers": linear_layers(vlm.model),
    }
    result = CellResult(cell, provenance=provenance, **content)
    write_json(path, asdict(result))
    if not result.unreadable:  # else the next run goes on from here
        shutil.rmtree(work_folder(path), ignore_errors=True)


def _look(cell: Cell, path: Path, vlm: VLM) -> dict[str, Any]:
    """What a cell about one question gives."""
    content: dict[str, Any] = {"score": None, "samples": [], "failures": []}
    if cell.kind == "cost":
        return {**content, "measured": measure_cost(vlm, cell)}
    view = path.with_suffix(".view.npz")
    record_view(vlm, cell, view)
    return {**content, "view": view.name}


def _score(cell: Cell, path: Path, vlm: VLM) -> dict[str, Any]:
    """What a cell that asks questions gives; what was answered before a crash is taken from its journal."""
    work = work_folder(path)
    keep = (lambda task, doc, run: run.trace.save(work / f"{task}_{doc}.trace")) if cell.kind == "trace" else None
    evaluation = evaluate(
        vlm,
        make_method(cell.method, cell.settings),
        DATASETS[cell.dataset],
        limit=cell.limit,
        journal=work / "journal.jsonl",
        save_trace=keep,
        seed=cell.seed,
    )
    extra = {}
    if cell.kind == "trace":
        median = cell.sample
        if median is None:
            median = median_sample(evaluation.samples)
        elif "error" in evaluation.samples[median]:
            why = evaluation.samples[median]["error"]
            raise UserError(f"question {median}, whose trace is wanted, was not answered: {why}")
        extra = {"median_index": median, "trace": f"{path.stem}.trace"}
        whole, partial = path.parent / extra["trace"], path.parent / f"{extra['trace']}.partial"
        shutil.copyfile(work / "{task}_{doc_id}.trace".format(**evaluation.samples[median]), partial)
        partial.replace(whole)
    return {**evaluation.to_dict(), **extra}


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
