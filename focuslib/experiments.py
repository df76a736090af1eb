"""Experiments as independent cells (model × data set × method × settings): run, resume, and collect them.

A cell's result is one JSON file, written atomically and named by everything that decides it; tables and figures are
derived from these files. So a run may be killed at any moment, or spread over machines, and started again.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import focuslib
from focuslib.errors import UserError, pick
from focuslib.journal import digest, write_json
from focuslib.methods.settings import make_method
from focuslib.models import MODELS, VLM
from focuslib.models.checkpoint import resolve_folder
from focuslib.params import check_param, method_settings, project_root
from focuslib.tasks.datasets import DATASETS
from focuslib.trace import Trace

# Files up to this size are part of a checkpoint's identity by content, larger ones by name and size.
_HASHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Cell:
    """One independent piece of an experiment.

    kind: "accuracy" scores the method, "matched" does at settings of equal computation sparsity, "sparsity" asks only
        the first questions, "trace" does too and keeps the median sample's trace.
    settings: every hyper-parameter of the method. limit: questions a task, None for all.
    checkpoint: a folder or hub id, None for the adapter's published one.
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

    def __str__(self) -> str:
        return f"{self.kind} {self.model} × {self.dataset} × {self.method}"

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


@dataclass
class Outcome:
    """What running an experiment's cells gave. failed: cell → one line that says why."""

    folder: Path
    results: list[CellResult] = field(default_factory=list)
    ran: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line on what ran, was resumed and failed, then a line a failure."""
        resumed = len(self.results) - self.ran
        lines = [f"{self.ran} cells run, {resumed} resumed, {len(self.failed)} failed; results in {self.folder}"]
        lines += [f"failed: {cell}: {why}" for cell, why in self.failed.items()]
        for result in self.results:
            lines += [f"unreadable: {result.cell}: question {f['doc_id']}: {f['error']}" for f in result.failures]
        return "\n".join(lines)


def make_cell(
    kind: str, *, model: str, dataset: str, method: str, limit: int | None, device: str, dtype: str, seed: int,
    checkpoint: str | None = None, settings: dict[str, Any] | None = None,
) -> Cell:  # fmt: skip
    """A cell with all names checked. settings: replace those of params/methods.yaml."""
    pick(MODELS, model, "model")
    pick(DATASETS, dataset, "dataset")
    chosen = make_method(method, {**method_settings(method, model, dataset), **(settings or {})})
    return Cell(kind, model, dataset, method, _plain(chosen.settings()), limit, device, dtype, seed, checkpoint)


def run_main(**params: Any) -> Outcome:
    """The main experiment: accuracy of every method, and the traces of Focus. Parameters: see params/*/main.yaml."""
    cells = []
    for common in _pairs(params):
        for method in params["methods"]:
            cells.append(make_cell("accuracy", method=method, limit=params["limit"], **common))
        if "focus" in params["methods"]:
            cells.append(make_cell("trace", method="focus", limit=params["trace_samples"], **common))
    folder = results_folder(params["profile"])
    return run_cells("main", cells, folder, folder / "focus_main")


def run_baselines(**params: Any) -> Outcome:
    """All methods on the same questions, and the sparsity of AdapTiV and CMC over the first ones.

    Parameters: see params/*/baselines.yaml. matched: method → settings for a second comparison, at equal sparsity.
    """
    cells = []
    for common in _pairs(params):
        for method in params["methods"]:
            cells.append(make_cell("accuracy", method=method, limit=params["limit"], **common))
            if method in ("adaptiv", "cmc"):
                cells.append(make_cell("sparsity", method=method, limit=params["trace_samples"], **common))
        for method, settings in (params["matched"] or {}).items():
            cells.append(make_cell("matched", method=method, settings=settings, limit=params["limit"], **common))
    return run_cells("baselines", cells, results_folder(params["profile"]))


def results_folder(profile: str) -> Path:
    """Where a profile's results are."""
    return project_root() / "results" / profile


def _pairs(params: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """What all cells of a (model, data set) pair have in common, pair by pair; the parameters are checked first."""
    for name, value in params.items():
        check_param(name, value)
    for model in params["models"]:
        for dataset in params["datasets"]:
            common = {key: params[key] for key in ("device", "dtype", "seed")}
            checkpoint = (params["checkpoints"] or {}).get(model)
            yield {"model": model, "dataset": dataset, "checkpoint": checkpoint, **common}


def run_cells(experiment: str, cells: Iterable[Cell], folder: Path, trace_folder: Path | None = None) -> Outcome:
    """Run the cells that have no result yet; one that fails is reported and the others go on.

    Writes folder/cells/*.json, the list of the experiment's cells and what became of them
    (folder/cells/<experiment>.index), and the simulator's traces trace_folder/<model>_<dataset>.pth.
    """
    outcome = Outcome(folder)
    cells = list(cells)
    loaded = _Loader()
    for cell in tqdm(cells, desc=experiment, unit="cell"):
        try:
            path = folder / "cells" / f"{cell.name()}.json"
            if not path.exists():
                _run(cell, path, loaded)
                outcome.ran += 1
            outcome.results.append(read_result(path))
        except UserError as error:
            outcome.failed[str(cell)] = str(error)
        except Exception as error:  # an unforeseen fault must not cost the other cells
            outcome.failed[str(cell)] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    if trace_folder:
        export_traces(outcome, trace_folder)
    index = {
        "cells": [f"{result.cell.name()}.json" for result in outcome.results],
        "complete": not outcome.failed and not any(result.failures for result in outcome.results),
        "text": outcome.summary(),
    }
    write_json(folder / "cells" / f"{experiment}.index", index)
    return outcome


def read_status(folder: Path, experiment: str) -> dict[str, Any]:
    """What the latest run of an experiment said: complete (bool) and text."""
    return json.loads((folder / "cells" / f"{experiment}.index").read_text())


def read_result(path: Path) -> CellResult:
    """A cell's result file."""
    value = json.loads(path.read_text())
    return CellResult(Cell(**value.pop("cell")), **value)


def collect(folder: Path) -> list[CellResult]:
    """The results of all experiments run in a results folder, each cell once, in the order of their indices."""
    names = []
    for index in sorted((folder / "cells").glob("*.index")):
        names += json.loads(index.read_text())["cells"]
    paths = [folder / "cells" / name for name in dict.fromkeys(names)]
    return [read_result(path) for path in paths if path.exists()]


def export_traces(outcome: Outcome, folder: Path) -> None:
    """Write the simulator's .pth of every trace cell whose file is missing or of another cell."""
    sources = outcome.folder / "cells" / f"{folder.name}.exported"
    known = json.loads(sources.read_text()) if sources.exists() else {}
    for result in outcome.results:
        if result.cell.kind != "trace":
            continue
        path = folder / f"{result.cell.model}_{result.cell.dataset}.pth"
        if known.get(path.name) != result.trace or not path.exists():
            Trace.load(outcome.folder / "cells" / result.trace).save_pth(path)
            known[path.name] = result.trace
            write_json(sources, known)


class _Loader:
    """Keeps one model in memory; a checkpoint that could not be loaded is not tried again."""

    def __init__(self):
        self.key: tuple | None = None
        self.vlm: VLM | None = None
        self.errors: dict[tuple, UserError] = {}

    def __call__(self, cell: Cell) -> VLM:
        from focuslib.evaluate import load_vlm

        key = (cell.model, cell.checkpoint, cell.device, cell.dtype)
        if key in self.errors:
            raise self.errors[key]
        if key != self.key:
            self.key = self.vlm = None
            gc.collect()
            try:
                self.vlm = load_vlm(cell.model, cell.checkpoint, device=cell.device, dtype=cell.dtype)
            except UserError as error:
                self.errors[key] = error
                raise
            self.key = key
        return self.vlm


def _run(cell: Cell, path: Path, loaded: _Loader) -> None:
    """Run one cell and write its result; what was answered before a crash is taken from its journal."""
    from focuslib.evaluate import evaluate  # imports lmms-eval, which a fully resumed run does not need

    vlm = loaded(cell)
    work = path.parent.parent / "work" / path.stem
    start = time.time()
    keep = (lambda doc, run: run.trace.save(work / f"{doc}.npz")) if cell.kind == "trace" else None
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
        median = median_index([sample["weighted_sparsity"] for sample in evaluation.samples])
        extra = {"median_index": median, "trace": f"{path.stem}.npz"}
        (work / f"{evaluation.samples[median]['doc_id']}.npz").replace(path.parent / extra["trace"])
    provenance = {**describe_machine(cell.device), "seconds": time.time() - start}
    write_json(path, {"cell": asdict(cell), **evaluation.to_dict(), "provenance": provenance, **extra})
    shutil.rmtree(work)


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
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(focuslib.__file__).parent, capture_output=True, text=True
    )
    return {
        "packages": {name: version(name) for name in ("torch", "transformers", "lmms-eval", "numpy")},
        "python": platform.python_version(),
        "git": git.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "cores": os.cpu_count(),
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON keeps them."""
    return json.loads(json.dumps(settings))
