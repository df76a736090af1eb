"""Cells: the independent pieces of an experiment (model × data set × method × settings). Run, resume, collect them.

A cell's result is one JSON file, written atomically and named by everything that decides it; tables and figures are
derived from these files. So a run may be killed at any moment, spread over processes or machines, and started again.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import focuslib
from focuslib.errors import UserError, pick
from focuslib.journal import digest, write_json
from focuslib.methods.settings import make_method
from focuslib.models import MODELS, VLM
from focuslib.models.checkpoint import resolve_folder
from focuslib.params import method_settings
from focuslib.progress import over_cells
from focuslib.tasks.datasets import DATASETS
from focuslib.tasks.sources import require
from focuslib.trace import Trace
from focuslib.workers import process_pool

# Files up to this size are part of a checkpoint's identity by content, larger ones by name and size.
_HASHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Cell:
    """One independent piece of an experiment.

    kind: "accuracy" scores the method, "matched" does at settings of equal computation sparsity, "ablation" with a part
        of the method switched off; "sparsity" asks only the first questions, "trace" does too and keeps the median
        sample's trace.
    settings: every hyper-parameter of the method. limit: questions a task, None for all.
    checkpoint: a folder or hub id, None for the adapter's published one. quantization: "int8" or None.
    sample: keep this sample's trace (its place among the samples) instead of the median's.
    """

    kind: str
    model: str
    dataset: str
    method: str
    settings: dict[str, Any] = field(hash=False)
    limit: int | None
    device: str
    dtype: str
    seed: int
    checkpoint: str | None = None
    quantization: str | None = None
    sample: int | None = None

    def __str__(self) -> str:
        precision = f" in {self.quantization}" if self.quantization else ""
        return f"{self.kind} {self.model} × {self.dataset} × {self.method}{precision}"

    def identity(self) -> dict[str, Any]:
        """All that decides the result. Raises UserError if the checkpoint or the data set is unknown or missing."""
        source = self.checkpoint or pick(MODELS, self.model, "model").checkpoint
        return {
            **asdict(self),
            "checkpoint": fingerprint(resolve_folder(source)),
            "data": pick(DATASETS, self.dataset, "dataset").version(),
            "focuslib": focuslib.__version__,
        }

    def name(self) -> str:
        """The file name of the cell's result, without its ending."""
        return f"{self.kind}_{self.model}_{self.dataset}_{self.method}_{digest(self.identity())}"


@dataclass
class CellResult:
    """A cell with what it gave (see evaluate.Evaluation); trace cells also have the median sample's index and trace."""

    cell: Cell
    score: float
    samples: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    provenance: dict[str, Any]
    median_index: int | None = None
    trace: str | None = None  # file name of the native trace, beside the result

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The samples that were answered."""
        return [sample for sample in self.samples if "error" not in sample]

    @property
    def unreadable(self) -> bool:
        """Whether there are questions that another run may answer: their media could not be read in this one."""
        return any(not failure.get("final") for failure in self.failures)


@dataclass
class Outcome:
    """What running an experiment's cells gave. failed: cell → one line that says why."""

    folder: Path
    results: list[CellResult] = field(default_factory=list)
    ran: int = 0
    failed: dict[Cell, str] = field(default_factory=dict)

    def result(self, cell: Cell) -> CellResult | None:
        """What a cell gave; None if it failed."""
        return next((result for result in self.results if result.cell == cell), None)

    def summary(self) -> str:
        """One line on what ran, was resumed and failed, then a line a failure."""
        resumed = len(self.results) - self.ran
        lines = [
            f"{self.ran} cells run, {resumed} resumed, {len(self.failed)} failed; results in {_shown(self.folder)}"
        ]
        lines += [f"failed: {cell}: {why}" for cell, why in self.failed.items()]
        for result in self.results:
            for failure in result.failures:
                what = "not possible" if failure.get("final") else "unreadable"
                lines.append(f"{what}: {result.cell}: {failure['task']} {failure['doc_id']}: {failure['error']}")
        return "\n".join(lines)


def _shown(folder: Path) -> Path:
    """A folder as the user knows it: from the project's root if it is inside."""
    root = Path(focuslib.__file__).parent.parent
    return folder.relative_to(root) if folder.is_relative_to(root) else folder


def make_cell(
    kind: str, *, model: str, dataset: str, method: str, limit: int | None, device: str, dtype: str, seed: int,
    checkpoint: str | None = None, settings: dict[str, Any] | None = None, quantization: str | None = None,
    sample: int | None = None,
) -> Cell:  # fmt: skip
    """A cell with all names checked. settings: replace those of params/methods.yaml."""
    pick(MODELS, model, "model")
    pick(DATASETS, dataset, "dataset")
    chosen = make_method(method, {**method_settings(method, model, dataset), **(settings or {})})
    settings = _plain(chosen.settings())
    return Cell(kind, model, dataset, method, settings, limit, device, dtype, seed, checkpoint, quantization, sample)


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
            outcome.results.append(replace(read_result(_result_file(cell, folder)), cell=cell))
    if trace_folder:
        traces = [result.cell for result in outcome.results if result.cell.kind == "trace"]
        export_traces(outcome, [(cell, trace_folder / pth_name(cell)) for cell in traces])
    index = {
        "cells": [f"{result.cell.name()}.json" for result in outcome.results],
        "complete": not outcome.failed and not any(result.unreadable for result in outcome.results),
        "text": outcome.summary(),
        "time": time.time(),
    }
    write_json(folder / "cells" / f"{experiment}.index", index)
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
        except OSError as error:  # no place for the data, say
            why = f"{name}: its data could not be made ({error})"
            yield from ((cell, False, why) for cell in left if cell.dataset == name)
            left = [cell for cell in left if cell.dataset != name]
    if min(workers, len(left)) > 1:
        yield from _spread(left, folder, workers)
        return
    loaded = _Loader()
    for cell in left:
        yield cell, *_attempt(cell, folder, loaded)


def _resume(cell: Cell, folder: Path) -> Settled | None:
    """A cell that is settled without running it: it has a whole result, or lacks its checkpoint."""
    try:
        path = _result_file(cell, folder)
    except UserError as error:
        return cell, False, str(error)
    if not path.exists() or read_result(path).unreadable:
        return None
    shutil.rmtree(_work_folder(path), ignore_errors=True)  # there if the run was killed right after its result
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
        path = _result_file(cell, folder)
        with claimed(path):
            if _resume(cell, folder):  # another process was at it
                return False, None
            _run(cell, path, loaded)
    except UserError as error:
        return False, str(error)
    except Exception as error:  # an unforeseen fault must not cost the other cells
        traceback.print_exc()
        return False, f"{type(error).__name__}: {error}"
    return True, None


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep a cell from being run by two processes at once. Raises UserError if another has it."""
    work = _work_folder(path)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another process is running it; run again when that has ended") from None
        yield


def _attempt_in_worker(cell: Cell, folder: Path) -> tuple[bool, str | None]:
    return _attempt(cell, folder, _worker_loader())


@cache
def _worker_loader() -> _Loader:
    """The loader of this process, which keeps its model from cell to cell."""
    return _Loader()


def _result_file(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name()}.json"


def _work_folder(result: Path) -> Path:
    """What a cell keeps until it has its result: answers, and the traces of all its samples."""
    return result.parent.parent / "work" / result.stem


def read_status(folder: Path, experiment: str) -> dict[str, Any]:
    """What the latest run of an experiment said: complete (bool), text, and time (seconds since 1970)."""
    return json.loads((folder / "cells" / f"{experiment}.index").read_text())


def read_result(path: Path) -> CellResult:
    """A cell's result file."""
    value = json.loads(path.read_text())
    return CellResult(Cell(**value.pop("cell")), **value)


def collect(folder: Path, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[CellResult]:
    """The results of the experiments run in a results folder, each cell once, those of the latest run first.

    only, skip: names of experiments to take or leave out.
    """
    found = [path for path in (folder / "cells").glob("*.index") if path.stem not in skip]
    indices = [json.loads(path.read_text()) for path in found if not only or path.stem in only]
    indices.sort(key=lambda index: index.get("time", 0), reverse=True)
    names = [name for index in indices for name in index["cells"]]
    paths = [folder / "cells" / name for name in dict.fromkeys(names)]
    return [read_result(path) for path in paths if path.exists()]


def export_traces(outcome: Outcome, targets: Iterable[tuple[Cell, Path]]) -> None:
    """Write the simulator's .pth of each trace cell that has a result, where it is missing or of another trace."""
    sources = outcome.folder / "cells" / "traces.exported"
    known = json.loads(sources.read_text()) if sources.exists() else {}
    for cell, path in targets:
        result = outcome.result(cell)
        if result is None:
            continue
        native = outcome.folder / "cells" / result.trace
        content = sha256(native.read_bytes()).hexdigest()
        if known.get(str(path)) != content or not path.exists():
            Trace.load(native).save_pth(path)
            known[str(path)] = content
            write_json(sources, known)


def pth_name(cell: Cell) -> str:
    """The file name of a cell's trace for the simulator."""
    return f"{cell.model}_{cell.dataset}.pth"


class _Loader:
    """Keeps one model in memory; a checkpoint that could not be loaded is not tried again."""

    def __init__(self):
        self.key: tuple | None = None
        self.vlm: VLM | None = None
        self.errors: dict[tuple, UserError] = {}

    def __call__(self, cell: Cell) -> VLM:
        key = (cell.model, cell.checkpoint, cell.device, cell.dtype, cell.quantization)
        if key in self.errors:
            raise self.errors[key]
        if key != self.key:
            self.key = self.vlm = None
            gc.collect()
            try:
                self.vlm = load_cell(cell)
            except UserError as error:
                self.errors[key] = error.with_traceback(None)  # which would keep what was loaded so far
                raise
            self.key = key
        return self.vlm


def load_cell(cell: Cell) -> VLM:
    """The model a cell runs on, as it runs on it."""
    from focuslib.evaluate import load_vlm  # imports lmms-eval, which a fully resumed run does not need

    return load_vlm(cell.model, cell.checkpoint, device=cell.device, dtype=cell.dtype, quantization=cell.quantization)


def _run(cell: Cell, path: Path, loaded: _Loader) -> None:
    """Run one cell and write its result; what was answered before a crash is taken from its journal."""
    from focuslib.evaluate import evaluate

    require(DATASETS[cell.dataset])  # before a model is loaded in vain
    vlm = loaded(cell)
    work = _work_folder(path)
    start = time.time()
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
        extra = {"median_index": median, "trace": f"{path.stem}.trace"}
        whole, partial = path.parent / extra["trace"], path.parent / f"{extra['trace']}.partial"
        shutil.copyfile(work / "{task}_{doc_id}.trace".format(**evaluation.samples[median]), partial)
        partial.replace(whole)
    provenance = {**describe_machine(cell.device), "seconds": time.time() - start}
    result = CellResult(cell, **evaluation.to_dict(), provenance=provenance, **extra)
    write_json(path, asdict(result))
    if not result.unreadable:  # else the next run goes on from here
        shutil.rmtree(work)


def median_sample(samples: list[dict[str, Any]]) -> int:
    """The sample of (lower) median weighted sparsity, of those whose media could be read."""
    readable = [index for index, sample in enumerate(samples) if "error" not in sample]
    return readable[median_index([samples[index]["weighted_sparsity"] for index in readable])]


def median_index(values: list[float]) -> int:
    """The first index of the (lower) median."""
    return values.index(sorted(values)[(len(values) - 1) // 2])


@cache
def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint folder: small files by content, large ones by name and size."""
    parts = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            size = file.stat().st_size
            content = sha256(file.read_bytes()).hexdigest() if size <= _HASHED_BYTES else ""
            parts.append([file.name, size, content])
    return digest(parts)


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


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON keeps them."""
    return json.loads(json.dumps(settings))
