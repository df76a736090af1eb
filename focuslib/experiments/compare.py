"""The comparison of methods and controls at equal counted sparsity: which cells it takes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from focuslib.errors import UserError, pick
from focuslib.experiments.cell import Cell, make_cell
from focuslib.methods import METHODS

CONTROL = "random"  # what every method is compared with, beside dense


def method_names(names: list[str]) -> list[str]:
    """The methods to compare; "all" stands for every one but dense."""
    every = [name for name in METHODS if name != "dense"]
    chosen = [name for given in names for name in (every if given == "all" else [given])]
    for name in chosen:
        for part in name.split("+"):
            pick(METHODS, part, "method")
    return list(dict.fromkeys(chosen))


def settings_at(method: str, target: float) -> dict[str, Any] | None:
    """The setting that has a method meet a counted sparsity, 0 … 1; None if it has none and keeps its own settings."""
    names = {field.name for field in fields(METHODS[method])} if method in METHODS else set()
    return {"target_sparsity": target} if "target_sparsity" in names else None


def compared_cells(
    pairs: list[dict[str, Any]], methods: list[str], targets: list[float], limit: int | None,
    settings: dict[str, dict[str, Any]] | None = None, *, costs: bool = True, views: bool = True,
) -> list[Cell]:  # fmt: skip
    """Accuracy of dense, and of every method at every target; a method that meets none, at its own settings once.

    Parameters
    ----------
    pairs
        What the cells of a (model, data set) have in common: model, dataset, checkpoint, device, dtype, seed.
    methods
        Names, or "all".
    targets
        Counted sparsities, 0 … 1.
    limit
        Questions a task, None for all.
    settings
        Method → settings that go before those of the target.
    costs, views
        Also the time and memory of a prefill at the last target, and what each method keeps of one clip of the last
        pair.
    """
    if not targets or any(not 0 < target < 1 for target in targets):
        raise UserError(f"targets {targets}: give sparsities between 0 and 1, such as 0.5 0.75")
    settings, cells = settings or {}, []
    for name in settings:
        pick(METHODS, name, "method")
    for common in pairs:
        cells.append(make_cell("accuracy", method="dense", limit=limit, **common))
        if costs:
            cells.append(make_cell("cost", method="dense", limit=1, **common))
        for method in method_names(methods):
            own = settings.get(method, {})
            points = [{**own, **(settings_at(method, target) or {})} for target in targets]
            cells += [make_cell("accuracy", method=method, settings=at, limit=limit, **common) for at in points]
            if costs:
                cells.append(make_cell("cost", method=method, settings=points[-1], limit=1, **common))
            if views and common is pairs[-1]:
                cells.append(make_cell("view", method=method, settings=points[-1], limit=1, **common))
    return list(dict.fromkeys(cells))
