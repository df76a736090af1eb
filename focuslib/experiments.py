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

import focuslib
from focuslib.errors import UserError, pick
from focuslib.journal import digest, write_json
from focuslib.methods.settings import make_method
from focuslib.models import MODELS, VLM
from focuslib.models.checkpoint import resolve_folder
from focuslib.params import check_param, method_settings, project_root
from focuslib.progress import over_cells
from focuslib.tasks.datasets import DATASETS
from focuslib.tasks.sources import require
from focuslib.trace import Trace

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


@dataclass
class Outcome:
    """What running an experiment's cells gave. failed: cell → one line that says why."""

    folder: Path
    results: list[CellResult] = field(default_factory=list)
    ran: int = 0
    failed: dict[str, str] = field(default_factory=dict)

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
            lines += [f"unreadable: {result.cell}: {f['task']} {f['doc_id']}: {f['error']}" for f in result.failures]
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


def run_main(**params: Any) -> Outcome:
    """The main experiment: accuracy of every method, and the traces of Focus. Parameters: see params/*/main.yaml."""
    return _run_experiment("main", params, "focus_main")


def run_baselines(**params: Any) -> Outcome:
    """All methods on the same questions, and the sparsity of AdapTiV and CMC over the first ones.

    Parameters: see params/*/baselines.yaml. matched: method → settings for a second comparison, at equal sparsity.
    """
    return _run_experiment("baselines", params)


def run_image(**params: Any) -> Outcome:
    """Single images: accuracy, the traces of Focus and the sparsity of AdapTiV. Parameters: see params/*/image.yaml."""
    return _run_experiment("image", params, "focus_main")


def run_dse(**params: Any) -> Outcome:
    """The design space of Focus: accuracy and trace at every point of each sweep, and Focus without SIC.

    Parameters: see params/*/dse.yaml. sweeps: name (see SWEEPS) → dataset and values. ablation_limit: questions a data
    set of `datasets` for the ablation, which is compared with the main experiment's cells.
    """
    outcome = run_cells("dse", dse_cells(params), results_folder(params["profile"]))
    if params.get("write_pth", True):
        export_traces(outcome, [(point.trace, outcome.folder / point.file) for point in sweep_points(params)])
    return outcome


def run_int8(**params: Any) -> Outcome:
    """Dense and Focus with the language model in 8 bit (LLM.int8), and the same cells of the main experiment.

    Each trace is of the main run's median sample. Parameters: see params/*/int8.yaml.
    """
    folder = results_folder(params["profile"])
    main = run_cells("int8", [cell for cell in int8_cells(params, {}) if cell.kind == "trace"], folder)
    medians = {(result.cell.model, result.cell.dataset): result.median_index for result in main.results}
    cells = int8_cells(params, medians)
    outcome = run_cells("int8", cells, folder)
    outcome.ran += main.ran
    if params.get("write_pth", True):
        quantized = [cell for cell in cells if cell.kind == "trace" and cell.quantization]
        export_traces(outcome, [(cell, folder / "focus_int8" / _pth_name(cell)) for cell in quantized])
    return outcome


def results_folder(profile: str) -> Path:
    """Where a profile's results are."""
    return project_root() / "results" / profile


def _run_experiment(name: str, params: dict[str, Any], trace_folder: str | None = None) -> Outcome:
    """Run the methods of a comparison; trace_folder: of the simulator's files of Focus, None to record no traces."""
    folder = results_folder(params["profile"])
    cells = comparison_cells(params, trace_folder is not None)
    write = trace_folder and params.get("write_pth", True)
    return run_cells(name, cells, folder, folder / trace_folder if write else None)


def comparison_cells(params: dict[str, Any], traces: bool = False) -> list[Cell]:
    """Accuracy of every method, the traces of Focus if wanted, the sparsity of AdapTiV and CMC if they take part."""
    cells = []
    for common in _pairs(params):
        first = {"limit": params["trace_samples"], **common}
        for method in params["methods"]:
            cells.append(make_cell("accuracy", method=method, limit=params["limit"], **common))
            if method in ("adaptiv", "cmc"):
                cells.append(make_cell("sparsity", method=method, **first))
            if method == "focus" and traces:
                cells.append(make_cell("trace", method=method, **first))
        for method, settings in (params.get("matched") or {}).items():
            cells.append(
                make_cell("matched", method=method, settings=settings, limit=params["matched_limit"], **common)
            )
    return cells


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep: its accuracy and trace cells, and the simulator's file in the results folder."""

    sweep: str
    value: str
    accuracy: Cell
    trace: Cell
    file: str


def sweep_points(params: dict[str, Any]) -> list[SweepPoint]:
    """Every point of a DSE, sweep by sweep."""
    points = []
    for sweep, what in params["sweeps"].items():
        settings_of = pick(SWEEPS, sweep, "sweep")
        if not isinstance(what, dict) or set(what) != {"dataset", "values"} or not isinstance(what["values"], list):
            raise UserError(f"sweeps: {sweep} must hold dataset and values (a list)")
        for common in _pairs({**params, "datasets": [what["dataset"]]}):
            for value in what["values"]:
                make = {"method": "focus", "settings": settings_of(value), **common}
                accuracy = make_cell("accuracy", limit=params["limit"], **make)
                trace = make_cell("trace", limit=params["trace_samples"], **make)
                file = f"{sweep}_dse/{common['model']}_{common['dataset']}_{value}.pth"
                points.append(SweepPoint(sweep, str(value), accuracy, trace, file))
    return points


def dse_cells(params: dict[str, Any]) -> list[Cell]:
    """The cells of a DSE, each once."""
    cells = [cell for point in sweep_points(params) for cell in (point.accuracy, point.trace)]
    for common in _pairs(params):
        common["limit"] = params["ablation_limit"]
        cells += [make_cell("accuracy", method=method, **common) for method in ("dense", "focus")]
        cells.append(make_cell("ablation", method="focus", settings={"sec_only": True}, **common))
    return list(dict.fromkeys(cells))


def int8_cells(params: dict[str, Any], medians: dict[tuple[str, str], int]) -> list[Cell]:
    """The cells in 8 bit and those of the main experiment. medians: (model, data set) → the sample that is traced."""

    def accuracy(common: dict[str, Any]) -> list[Cell]:
        return [make_cell("accuracy", method=method, limit=params["limit"], **common) for method in ("dense", "focus")]

    cells = []
    for common in _pairs(params):
        cells.append(make_cell("trace", method="focus", limit=params["trace_samples"], **common))
        cells += accuracy(common)
    for common in _pairs(params):
        common["quantization"] = "int8"
        cells += accuracy(common)
        median = medians.get((common["model"], common["dataset"]))
        if median is not None:
            cells.append(make_cell("trace", method="focus", limit=params["trace_samples"], sample=median, **common))
    return cells


def planned_cells(experiment: str, params: dict[str, Any]) -> list[Cell]:
    """The cells of an experiment, so far as they are known before it runs."""
    if experiment == "dse":
        return dse_cells(params)
    if experiment == "int8":
        any_median = {(model, dataset): 0 for model in params["models"] for dataset in params["datasets"]}
        return int8_cells(params, any_median)
    return comparison_cells(params, traces=experiment != "baselines")


def _block(text: Any) -> dict[str, int]:
    """Settings of a block written 2x3x3 (frames, rows, columns)."""
    frames, _, sides = str(text).partition("x")
    side, _, again = sides.partition("x")
    if not frames.isdigit() or not side.isdigit() or side != again:
        raise UserError(f"block size {text!r}: write frames x side x side, such as 2x3x3")
    return {"frame_block": int(frames), "block": int(side)}


# sweep → the settings of Focus that a value of it stands for
SWEEPS = {
    "m_tile_size": lambda value: {"m_tile": value},
    "vector_size": lambda value: {"vector_size": value},
    "block_size": _block,
}


def _pairs(params: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """What all cells of a (model, data set) pair have in common, pair by pair; the parameters are checked first."""
    for name, value in params.items():
        check_param(name, value)
    for model in params["models"]:
        for dataset in params["datasets"]:
            common = {key: params[key] for key in ("device", "dtype", "seed")}
            checkpoint = (params.get("checkpoints") or {}).get(model)
            yield {"model": model, "dataset": dataset, "checkpoint": checkpoint, **common}


def run_cells(experiment: str, cells: Iterable[Cell], folder: Path, trace_folder: Path | None = None) -> Outcome:
    """Run the cells that have no result yet; one that fails is reported and the others go on.

    Writes folder/cells/*.json, the list of the experiment's cells and what became of them
    (folder/cells/<experiment>.index), and the simulator's traces trace_folder/<model>_<dataset>.pth.
    """
    outcome = Outcome(folder)
    cells = list(cells)
    loaded = _Loader()
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for cell in over_cells(cells, experiment):
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
        traces = [result.cell for result in outcome.results if result.cell.kind == "trace"]
        export_traces(outcome, [(cell, trace_folder / _pth_name(cell)) for cell in traces])
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


def collect(folder: Path, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[CellResult]:
    """The results of the experiments run in a results folder, each cell once, in the order of the indices.

    only, skip: names of experiments to take or leave out.
    """
    names = []
    for index in sorted((folder / "cells").glob("*.index")):
        if index.stem not in skip and (not only or index.stem in only):
            names += json.loads(index.read_text())["cells"]
    paths = [folder / "cells" / name for name in dict.fromkeys(names)]
    return [read_result(path) for path in paths if path.exists()]


def export_traces(outcome: Outcome, targets: Iterable[tuple[Cell, Path]]) -> None:
    """Write the simulator's .pth of each trace cell that has a result, where it is missing or of another cell."""
    sources = outcome.folder / "cells" / "traces.exported"
    known = json.loads(sources.read_text()) if sources.exists() else {}
    for cell, path in targets:
        result = outcome.result(cell)
        if result is not None and (known.get(str(path)) != result.trace or not path.exists()):
            Trace.load(outcome.folder / "cells" / result.trace).save_pth(path)
            known[str(path)] = result.trace
            write_json(sources, known)


def _pth_name(cell: Cell) -> str:
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
                self.errors[key] = error
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
    work = path.parent.parent / "work" / path.stem
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
        chosen = work / "{task}_{doc_id}.trace".format(**evaluation.samples[median])
        if chosen.exists():  # else a run that was killed right after this line has moved it
            chosen.replace(path.parent / extra["trace"])
    provenance = {**describe_machine(cell.device), "seconds": time.time() - start}
    write_json(path, {"cell": asdict(cell), **evaluation.to_dict(), "provenance": provenance, **extra})
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
