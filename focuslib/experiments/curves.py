"""Curves: every method from mild to hard settings. Which cells they take, and which point is nearest a sparsity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from focuslib.errors import UserError, pick
from focuslib.experiments.cell import Cell, make_cell
from focuslib.experiments.compare import settings_at
from focuslib.experiments.store import CellResult
from focuslib.methods import METHODS


@dataclass(frozen=True)
class CurvePoint:
    """One setting of a curve on one data set. setting: what it has of its own, in words. cell: its accuracy."""

    curve: str
    family: str
    setting: str
    cell: Cell


def curve_points(
    pairs: list[dict[str, Any]], curves: dict[str, dict[str, Any]], targets: list[float], limit: int | None
) -> list[CurvePoint]:
    """Every point of every curve, (model, data set) by (model, data set).

    Parameters
    ----------
    pairs
        What the cells of a (model, data set) have in common: model, dataset, checkpoint, device, dtype, seed.
    curves
        Name → method, family, settings, points, targets (see params.Curve).
    targets
        Counted sparsities, 0 … 1, of the curves that have neither points nor targets of their own.
    limit
        Questions a task, None for all.
    """
    found = []
    for common in pairs:
        for name, curve in curves.items():
            method = curve["method"] or name
            for own in _settings(name, method, curve, targets):
                settings = {**curve["settings"], **own}
                cell = make_cell("accuracy", method=method, settings=settings, limit=limit, **common)
                found.append(CurvePoint(name, curve["family"], _words(own), cell))
    return found


def _settings(name: str, method: str, curve: dict[str, Any], targets: list[float]) -> list[dict[str, Any]]:
    """What each point of a curve sets."""
    for part in method.split("+"):
        pick(METHODS, part, "method")
    if curve["points"]:
        return curve["points"]
    if settings_at(method, 0.5) is None:
        raise UserError(f"curves.{name}: {method} meets no target; give points, a list of its settings")
    return [settings_at(method, target) or {} for target in curve["targets"] or targets]


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def curve_cells(pairs: list[dict[str, Any]], points: list[CurvePoint], limit: int | None) -> list[Cell]:
    """The cells of curves that are known before any has run: dense, and every point."""
    cells = [make_cell("accuracy", method="dense", limit=limit, **common) for common in pairs]
    return list(dict.fromkeys([*cells, *(point.cell for point in points)]))


def counted_sparsity(result: CellResult) -> float:
    """Mean counted computation sparsity of the questions that were answered, in percent."""
    return 100 * float(np.mean([sample["computation_sparsity"] for sample in result.answered]))


def nearest_points(
    points: list[CurvePoint], results: list[CellResult], near: float
) -> dict[tuple[str, str, str], tuple[CurvePoint, CellResult]]:
    """Of each curve, the point with answers whose counted sparsity is nearest to `near` (percent).

    Returns (curve, model, data set) → point and result.
    """
    known = {result.cell: result for result in results}
    chosen: dict[tuple[str, str, str], tuple[CurvePoint, CellResult]] = {}
    for point in points:
        result, key = known.get(point.cell), (point.curve, point.cell.model, point.cell.dataset)
        if result is None or not result.answered:
            continue
        away = abs(counted_sparsity(result) - near)
        if key not in chosen or away < abs(counted_sparsity(chosen[key][1]) - near):
            chosen[key] = point, result
    return chosen


def looked_at(dense: CellResult, count: int, seed: int) -> list[int]:
    """Numbers of the questions whose clips are shown: `count` of each kind of the first task, drawn by the seed."""
    rng, kinds = np.random.default_rng(seed), {}
    for sample in dense.samples:
        if sample["task"] == dense.samples[0]["task"]:
            kinds.setdefault(sample.get("question_type", ""), []).append(sample["doc_id"])
    drawn = [rng.permutation(numbers)[:count] for _, numbers in sorted(kinds.items())]
    return [int(number) for numbers in drawn for number in numbers]


def look_cells(results: list[CellResult], count: int, seed: int) -> list[Cell]:
    """Views of clips of the last model and data set: what the tokens that each method left are drawn on.

    They are known once dense has its result. The clips are drawn by kind of question, whatever the answers are.
    """
    dense = [result for result in results if result.cell.method == "dense" and result.cell.kind == "accuracy"]
    if not dense:
        return []
    numbers = looked_at(dense[-1], count, seed)
    return [replace(dense[-1].cell, kind="view", limit=1, sample=number) for number in numbers]
