"""Choose a method's settings on a tune split: a grid, or bisection of one setting to a target computation sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from focuslib.errors import UserError
from focuslib.evaluation.statistics import mean_interval, paired_difference
from focuslib.experiments.cell import Cell, make_cell
from focuslib.experiments.runner import run_cells
from focuslib.experiments.store import CellResult, paired_scores

Common = dict[str, Any]  # the arguments of make_cell that all settings share, but for the data set


def grid_search(
    method: str, grid: dict[str, list[str]], datasets: list[str], common: Common, folder: Path, workers: int = 1
) -> pd.DataFrame:
    """Score every combination of the grid's values, and dense, on all data sets.

    workers: processes that share the work (see runner.run_cells).
    Returns one row a setting: the values, mean score over the data sets, mean difference to dense on the same questions
    (points) and mean computation sparsity (percent), sparsest first.
    """
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    cells = [cell for chosen in settings for cell in _cells(method, chosen, datasets, common)]
    _run(dict.fromkeys(cells), folder, workers)
    rows = [{**chosen, **_score(method, chosen, datasets, common, folder)} for chosen in settings]
    return pd.DataFrame(rows).sort_values("Computation sparsity", ascending=False, ignore_index=True)


def best_row(table: pd.DataFrame, tolerance: float) -> pd.Series:
    """The sparsest setting that loses at most `tolerance` points to dense; if none does, the one that loses least."""
    near = table[table["Difference"] >= -tolerance]
    return near.iloc[0] if len(near) else table.loc[table["Difference"].idxmax()]


def bisect_sparsity(
    method: str, name: str, low: float, high: float, target: float, fixed: dict[str, Any], datasets: list[str],
    common: Common, folder: Path, tolerance: float = 0.5, steps: int = 12, workers: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """Find the value of one monotone setting between low and high that gives the target computation sparsity (percent).

    Returns the tried rows, the closest first. Raises UserError if the target is outside what low and high reach.
    """
    tried: list[dict[str, Any]] = []

    def sparsity(value: float) -> float:
        row = _score(method, {**fixed, name: value}, datasets, common, folder, workers)
        tried.append({name: value, **row})
        return row["Computation sparsity"]

    close(sparsity, low, high, target, tolerance, steps, f"method {method}: {name}")
    table = pd.DataFrame(tried)
    return table.loc[(table["Computation sparsity"] - target).abs().sort_values().index].reset_index(drop=True)


def close(
    function: Callable[[float], float], low: float, high: float, target: float, tolerance: float, steps: int, what: str
) -> None:
    """Evaluate a monotone function until a value is within the tolerance of the target.

    First at the ends, then where a line between the values around the target meets it, at most `steps` times.
    """
    at_low = function(low)
    if abs(at_low - target) <= tolerance:
        return
    at_high = function(high)
    if abs(at_high - target) <= tolerance:
        return
    if not min(at_low, at_high) <= target <= max(at_low, at_high):
        raise UserError(f"{what} from {low} to {high} reaches {at_low:.1f} to {at_high:.1f} %, not {target:.1f} %")
    for _ in range(steps):
        part = (target - at_low) / (at_high - at_low)
        middle = low + min(max(part, 0.1), 0.9) * (high - low)  # at a step, the value of one end never changes
        value = function(middle)
        if abs(value - target) <= tolerance:
            return
        if (value < target) == (at_low < at_high):
            low, at_low = middle, value
        else:
            high, at_high = middle, value


def _cells(method: str, settings: dict[str, Any], datasets: list[str], common: Common) -> list[Cell]:
    """For each data set, the dense model and the method."""
    return [
        make_cell("accuracy", dataset=dataset, method=name, settings=chosen, **common)
        for dataset in datasets
        for name, chosen in (("dense", {}), (method, settings))
    ]


def _run(cells: Iterable[Cell], folder: Path, workers: int) -> list[CellResult]:
    outcome = run_cells("tune", cells, folder, workers=workers)
    if outcome.failed:
        raise UserError(next(iter(outcome.failed.values())))
    return outcome.results


def _score(
    method: str, settings: dict[str, Any], datasets: list[str], common: Common, folder: Path, workers: int = 1
) -> dict[str, float]:
    """Mean score, difference to dense and sparsity over the data sets."""
    results = _run(_cells(method, settings, datasets, common), folder, workers)
    pairs = list(zip(results[::2], results[1::2], strict=True))
    rows = [
        {
            "Score": result.score,
            "Difference": 100 * paired_difference(*paired_scores(dense, result))[0],
            "Computation sparsity": 100 * mean_interval([s["computation_sparsity"] for s in result.answered])[0],
        }
        for dense, result in pairs
    ]
    return pd.DataFrame(rows).mean().to_dict()
