"""The paper's experiments, each a list of independent cells (see cell.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from focuslib.errors import UserError, brief, pick
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.settings import checked_entries, matching_settings, methods_file
from focuslib.experiments.cell import Cell, make_cell
from focuslib.experiments.compare import compared_cells
from focuslib.experiments.curves import CurvePoint, curve_cells, curve_points, look_cells
from focuslib.experiments.params import experiment_params
from focuslib.experiments.runner import Workers, run_cells
from focuslib.experiments.store import CellResult, Outcome, export_traces, pth_name, write_status
from focuslib.hardware.accelerators import ACCELERATORS
from focuslib.hardware.reproduction import HardwareStudy, reproduce_hardware
from focuslib.methods import METHODS
from focuslib.models import MODELS
from focuslib.models.registry import named
from focuslib.paths import params_folder, project_root, shown


def run(experiment: str, profile: str, changes: dict[str, Any] | None = None) -> Outcome:
    """Run an experiment of cells as its parameter file says, and export its traces.

    Parameters
    ----------
    experiment
        main, baselines, methods, curves, dse, int8 or image. (The others have no cells: see `study_hardware` and
        speed.study_speed.)
    profile
        The folder of params/ whose file is read.
    changes
        Values that replace those of the file.

    Raises
    ------
    UserError
        For a mistake in the parameters, in one line, before anything runs. A cell that fails is in the outcome.

    Examples
    --------
    >>> run("main", "laptop", {"limit": 6, "results": "dev"})  # doctest: +SKIP
    """
    if experiment in ("hardware", "speed"):
        raise UserError(f"{experiment} has no cells to run; call study_{experiment}(profile)")
    params, cells = plan(experiment, profile, changes)
    folder = results_folder(params["results"])
    traces = folder / "focus_main" if experiment in ("main", "image") and params["write_pth"] else None
    outcome = run_cells(experiment, cells, folder, traces, Workers.of(params))
    if further := further_cells(experiment, params, outcome.results):
        outcome.add(run_cells(experiment, further, folder, workers=Workers.of(params)))
        write_status(folder, experiment, outcome.results, outcome.complete, outcome.summary())
    if experiment == "dse" and params["write_pth"]:
        export_traces(outcome, [(point.trace, folder / point.file) for point in sweep_points(params)])
    if experiment == "int8" and params["write_pth"]:
        traced = [cell for cell in further if cell.quantization]
        export_traces(outcome, [(cell, folder / "focus_int8" / pth_name(cell)) for cell in traced])
    return outcome


def further_cells(experiment: str, params: dict[str, Any], results: list[CellResult]) -> list[Cell]:
    """The cells of an experiment that are known once the first ones (see plan) have their results.

    int8: traces in 8 bit of the main experiment's median samples. curves: views of some clips. Others have none.
    """
    if experiment == "int8":
        return int8_traces(params, results)
    if experiment == "curves":
        return look_cells(results, params["looks"], params["seed"])
    return []


def points_of(params: dict[str, Any]) -> list[CurvePoint]:
    """Every point of the curves."""
    return curve_points(list(_pairs(params)), params["curves"], params["targets"], params["limit"])


def study_hardware(profile: str, changes: dict[str, Any] | None = None) -> HardwareStudy:
    """The hardware models on the published inputs and on what a profile's results folder has.

    Writes that folder's hardware/*.csv and, as other experiments do, what became of it. Parameters as of `run`.
    """
    params, _ = plan("hardware", profile, changes)
    folder = results_folder(params["results"])
    design = {name: params[name] for name in ("accelerators", "m_tile", "vector_size", "scatter")}
    study = reproduce_hardware(folder, params_folder() / "published" / "hardware", **design)
    text = f"the paper's cells, and {len(study.ours)} rows of {shown(folder)}"
    write_status(folder, "hardware", [], True, "\n".join([text, *study.missing]))
    return study


def results_folder(name: str) -> Path:
    """Where results are; name: the profile's, or another folder's that a run was given."""
    return project_root() / "results" / name


def expected_folder(profile: str) -> Path:
    """Where the committed results of a profile are, which its runs are compared with."""
    return project_root() / "results" / "expected" / profile


def plan(experiment: str, profile: str, changes: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Cell]]:
    """An experiment's parameters, and its cells so far as they are known before it runs.

    Raises UserError, in one line that names the file, for any mistake in the parameters.
    """
    params = experiment_params(experiment, profile, changes)
    methods_file()  # first, so that its mistakes are not said to be the experiment's
    try:
        return params, CELLS[experiment](params)
    except UserError as error:
        raise UserError(f"{shown(params_folder() / profile / f'{experiment}.yaml')}: {error}") from error


def comparison_cells(
    params: dict[str, Any], traces: bool = False, costs: bool = False, view: bool = False
) -> list[Cell]:
    """Accuracy of every method, and the sparsity of AdapTiV and CMC if they take part.

    What few questions are asked for comes first: their answers are of use to the accuracies (see known).
    traces: also the traces of Focus. costs: also what a prefill costs under every method. view: also what a view of one
    question of the last model and data set shows.
    """
    cells = []
    for common in _pairs(params):
        first = {"limit": params["trace_samples"], **common}
        for method in params["methods"]:
            if method == "focus" and traces:
                cells.append(make_cell("trace", method=method, **first))
            if method in ("adaptiv", "cmc"):
                cells.append(make_cell("sparsity", method=method, **first))
            cells.append(make_cell("accuracy", method=method, limit=params["limit"], **common))
            if costs:
                cells.append(make_cell("cost", method=method, limit=1, **common))
        if params.get("grey"):
            cells.append(make_cell("blank", method="dense", limit=params["limit"], **common))
        for method, entries in (params.get("matched") or {}).items():
            settings = matching_settings(checked_entries(method, entries), common["model"], common["dataset"])
            cells.append(
                make_cell("matched", method=method, settings=settings, limit=params["matched_limit"], **common)
            )
    if view and "focus" in params["methods"]:
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
        for common in _pairs({**params, "datasets": [what["dataset"]]}):
            for value in what["values"]:
                make = {"method": "focus", "settings": {**what["settings"], **settings_of(value)}, **common}
                accuracy = make_cell("accuracy", limit=params["limit"], **make)
                trace = make_cell("trace", limit=params["trace_samples"], **make)
                file = f"{sweep}_dse/{common['model']}_{common['dataset']}_{value}.pth"
                points.append(SweepPoint(sweep, str(value), accuracy, trace, file))
    return points


def dse_cells(params: dict[str, Any]) -> list[Cell]:
    """The cells of a DSE, each once."""
    cells = [cell for point in sweep_points(params) for cell in (point.trace, point.accuracy)]  # see comparison_cells
    for common in _pairs(params):
        common["limit"] = params["ablation_limit"]
        cells += [make_cell("accuracy", method=method, **common) for method in ("dense", "focus")]
        cells.append(make_cell("ablation", method="focus", settings={"sec_only": True}, **common))
    return list(dict.fromkeys(cells))


def int8_cells(params: dict[str, Any]) -> list[Cell]:
    """The cells in 8 bit, and those of the main experiment."""
    cells = []
    for quantization in (None, params.get("quantization", "int8")):
        for common in _pairs(params):
            if quantization is None:
                cells.append(make_cell("trace", method="focus", limit=params["trace_samples"], **common))
            for method in ("dense", "focus"):
                accuracy = {"method": method, "limit": params["limit"], "quantization": quantization}
                cells.append(make_cell("accuracy", **accuracy, **common))
    return cells


def int8_traces(params: dict[str, Any], results: list[CellResult]) -> list[Cell]:
    """The traces in 8 bit, each of the sample that the main experiment's trace is of."""
    traced = [result for result in results if result.cell.kind == "trace" and not result.cell.quantization]
    quantization = params.get("quantization", "int8")
    return [replace(one.cell, quantization=quantization, sample=one.median_index) for one in traced]


def _no_cells_of_hardware(params: dict[str, Any]) -> list[Cell]:
    """The hardware models run no cells; their accelerators' names are checked."""
    for name in params["accelerators"] or []:
        pick(ACCELERATORS, name, "accelerator")
    return []


def _no_cells_of_speed(params: dict[str, Any]) -> list[Cell]:
    """What is timed is no cell: a notebook that is executed measures it anew. The names are checked."""
    for kind, names, registry in (
        ("model", [*params["models"], *(params["checkpoints"] or {})], MODELS),
        ("data set", params["datasets"], DATASETS),
        ("method", params["methods"], METHODS),
    ):
        for name in names:
            pick(registry, name, kind)
    return []


# experiment → its cells, of checked parameters (see params.py)
CELLS: dict[str, Callable[[dict[str, Any]], list[Cell]]] = {
    "main": lambda params: comparison_cells(params, traces=True, view=True),
    "baselines": lambda params: comparison_cells(params, costs=True),
    "methods": lambda params: compared_cells(
        list(_pairs(params)), params["methods"], params["targets"], params["limit"], params["settings"]
    ),
    "curves": lambda params: curve_cells(list(_pairs(params)), points_of(params), params["limit"]),
    "image": lambda params: comparison_cells(params, traces=True),
    "dse": dse_cells,
    "int8": int8_cells,
    "hardware": _no_cells_of_hardware,
    "speed": _no_cells_of_speed,
}


def _block(text: Any) -> dict[str, int]:
    """Settings of a block written 2x3x3 (frames, rows, columns)."""
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})x\2", str(text))
    if not found:
        raise UserError(f"block size {brief(text)}: write frames x side x side, such as 2x3x3")
    return {"frame_block": int(found[1]), "block": int(found[2])}


# sweep → the settings of Focus that a value of it stands for
SWEEPS = {
    "m_tile_size": lambda value: {"m_tile": value},
    "vector_size": lambda value: {"vector_size": value},
    "block_size": _block,
}


def _pairs(params: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """What all cells of a (model, data set) pair have in common, pair by pair.

    Raises UserError for two checkpoints of one name: their rows and traces would be taken for each other's.
    """
    checkpoints = params["checkpoints"] or {}
    if stray := [model for model in checkpoints if model not in params["models"]]:
        pick(MODELS, stray[0], "model")
    common = {key: params.get(key) for key in ("device", "dtype", "seed", "frames", "fps")}
    found: dict[str, str | None] = {}
    for model in params["models"]:
        name, checkpoint = named(model, checkpoints.get(model))
        if found.setdefault(name, checkpoint) != checkpoint:
            raise UserError(
                f"two checkpoints called {name}: {found[name]} and {checkpoint}; give one a name of its own: "
                f"models: [{name}-2], checkpoints: {{{name}-2: {checkpoint}}}"
            )
        for dataset in params["datasets"]:
            yield {"model": name, "dataset": dataset, "checkpoint": checkpoint, **common}
