"""The paper's experiments, each a list of independent cells (see cells.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslib.errors import UserError, pick
from focuslib.evaluation.settings import matching_settings
from focuslib.experiments.cell import Cell, make_cell
from focuslib.experiments.params import check_param
from focuslib.experiments.runner import run_cells
from focuslib.experiments.store import Outcome, export_traces, pth_name
from focuslib.paths import project_root


def run_main(**params: Any) -> Outcome:
    """The main experiment: accuracy of every method, and the traces of Focus. Parameters: see params/*/main.yaml."""
    return _run_experiment("main", params, "focus_main")


def run_baselines(**params: Any) -> Outcome:
    """All methods on the same questions, and the sparsity of AdapTiV and CMC over the first ones.

    Parameters: see params/*/baselines.yaml. matched: method → entries as in params/methods.yaml, for a second
    comparison at equal sparsity.
    """
    return _run_experiment("baselines", params, costs=True)


def run_image(**params: Any) -> Outcome:
    """Single images: accuracy, the traces of Focus and the sparsity of AdapTiV. Parameters: see params/*/image.yaml."""
    return _run_experiment("image", params, "focus_main")


def run_dse(**params: Any) -> Outcome:
    """The design space of Focus: accuracy and trace at every point of each sweep, and Focus without SIC.

    Parameters: see params/*/dse.yaml. sweeps: name (see SWEEPS) → dataset and values. ablation_limit: questions a data
    set of `datasets` for the ablation, which is compared with the main experiment's cells.
    """
    outcome = run_cells("dse", dse_cells(params), results_folder(params["profile"]), workers=params.get("workers", 1))
    if params.get("write_pth", True):
        export_traces(outcome, [(point.trace, outcome.folder / point.file) for point in sweep_points(params)])
    return outcome


def run_int8(**params: Any) -> Outcome:
    """Dense and Focus with the language model in 8 bit (LLM.int8), and the same cells of the main experiment.

    Each trace is of the main run's median sample. Parameters: see params/*/int8.yaml.
    """
    folder, workers = results_folder(params["profile"]), params.get("workers", 1)
    traced = [cell for cell in int8_cells(params, {}) if cell.kind == "trace"]
    main = run_cells("int8", traced, folder, workers=workers)
    medians = {(result.cell.model, result.cell.dataset): result.median_index for result in main.results}
    cells = int8_cells(params, medians)
    outcome = run_cells("int8", cells, folder, workers=workers)
    outcome.ran += main.ran
    if params.get("write_pth", True):
        quantized = [cell for cell in cells if cell.kind == "trace" and cell.quantization]
        export_traces(outcome, [(cell, folder / "focus_int8" / pth_name(cell)) for cell in quantized])
    return outcome


def results_folder(profile: str) -> Path:
    """Where a profile's results are."""
    return project_root() / "results" / profile


def expected_folder(profile: str) -> Path:
    """Where the committed results of a profile are, which its runs are compared with."""
    return project_root() / "results" / "expected" / profile


def _run_experiment(name: str, params: dict[str, Any], trace_folder: str | None = None, costs: bool = False) -> Outcome:
    """Run the methods of a comparison; trace_folder: of the simulator's files of Focus, None to record no traces."""
    folder = results_folder(params["profile"])
    cells = comparison_cells(params, trace_folder is not None, costs)
    write = trace_folder and params.get("write_pth", True)
    return run_cells(name, cells, folder, folder / trace_folder if write else None, params.get("workers", 1))


def comparison_cells(params: dict[str, Any], traces: bool = False, costs: bool = False) -> list[Cell]:
    """Accuracy of every method, and the sparsity of AdapTiV and CMC if they take part.

    traces: also the traces of Focus, and a view of one question of the last model and data set. costs: also what a
    prefill costs under every method.
    """
    cells = []
    for common in _pairs(params):
        first = {"limit": params["trace_samples"], **common}
        for method in params["methods"]:
            cells.append(make_cell("accuracy", method=method, limit=params["limit"], **common))
            if costs:
                cells.append(make_cell("cost", method=method, limit=1, **common))
            if method in ("adaptiv", "cmc"):
                cells.append(make_cell("sparsity", method=method, **first))
            if method == "focus" and traces:
                cells.append(make_cell("trace", method=method, **first))
        for method, entries in (params.get("matched") or {}).items():
            settings = matching_settings(entries, common["model"], common["dataset"])
            cells.append(
                make_cell("matched", method=method, settings=settings, limit=params["matched_limit"], **common)
            )
    if traces and "focus" in params["methods"]:
        cells.append(make_cell("view", method="focus", limit=1, **common))
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
        common["quantization"] = params.get("quantization", "int8")
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
    return comparison_cells(params, traces=experiment != "baselines", costs=experiment == "baselines")


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
