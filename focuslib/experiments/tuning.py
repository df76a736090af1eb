"""The searches behind a profile's settings, as its tuning.yaml lists them: run again, with a table of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from focuslib.errors import UserError
from focuslib.experiments.cell import make_cell
from focuslib.experiments.params import Count, Names
from focuslib.experiments.tune import best_row, bisect_sparsity, grid_search
from focuslib.paths import params_folder, read_yaml
from focuslib.validation import Strict, validate

BISECT_TOLERANCE = 0.25  # points of counted sparsity


class Grid(Strict):
    """One grid search. method: the entry's name by default. fixed: settings that every combination has."""

    method: str | None = None
    datasets: Names
    values: dict[str, Annotated[list[Any], Field(min_length=1)]]
    fixed: dict[str, Any] = Field(default_factory=dict)


class Bisection(Strict):
    """One bisection to the target, data set by data set. ranges: data set → its own low and high."""

    setting: str
    low: float
    high: float
    ranges: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(default_factory=dict)
    fixed: dict[str, Any] = Field(default_factory=dict)


class Tuning(Strict):
    """A tuning.yaml. tolerance: points that a setting may lose to dense.

    target: counted sparsity in percent. targets: data set → another one, where a method's sparsity moves in steps.
    """

    model: str
    checkpoint: str | None = None
    limit: Count | None = None
    bisect_limit: Count | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    workers: Count = 1
    tolerance: float = 1.0
    target: float = 60
    targets: dict[str, float] = Field(default_factory=dict)
    datasets: list[str] = Field(default_factory=list)
    grid: dict[str, Grid] = Field(default_factory=dict)
    bisect: dict[str, Bisection] = Field(default_factory=dict)

    def target_of(self, dataset: str) -> float:
        """The counted sparsity that all methods are matched at on a data set."""
        return self.targets.get(dataset, self.target)

    def common(self) -> dict[str, Any]:
        """What all cells have in common."""
        return {name: getattr(self, name) for name in ("model", "checkpoint", "limit", "device", "dtype", "seed")}


def read_tuning(path: Path) -> Tuning:
    """A tuning.yaml. Raises UserError in one line if it is not one."""
    tuning = Tuning(**validate(Tuning, read_yaml(path), str(path)))
    searches = [
        (f"grid.{name}", grid.method or name, {**grid.fixed, **{key: values[0] for key, values in grid.values.items()}})
        for name, grid in tuning.grid.items()
    ]
    searches += [
        (f"bisect.{name}", name, {**bisection.fixed, bisection.setting: bisection.low})
        for name, bisection in tuning.bisect.items()
    ]
    for where, method, settings in searches:  # a name or setting that no cell can have is refused before any runs
        kind, name = where.split(".", 1)
        for dataset in tuning.grid[name].datasets if kind == "grid" else tuning.datasets:
            try:
                make_cell("accuracy", method=method, dataset=dataset, settings=settings, **tuning.common())
            except UserError as error:
                raise UserError(f"{path}: {where}: model {tuning.model}: {error}") from None
    return tuning


def run_tuning(profile: str, folder: Path) -> pd.DataFrame:
    """Run every search of a profile; writes folder/tuning/<search>.csv each, and chosen.csv, which is returned.

    chosen.csv has one row a search (and data set, for a bisection): its settings, the counted sparsity and, for a grid,
    the score and its difference to dense. What is there from an earlier run is not run again.
    """
    tuning, target = read_tuning(params_folder() / profile / "tuning.yaml"), folder / "tuning"
    folder = target  # its cells too: they are no results of an experiment
    target.mkdir(parents=True, exist_ok=True)
    chosen = []
    for name, grid in tuning.grid.items():
        values = {**{key: [value] for key, value in grid.fixed.items()}, **grid.values}
        table = grid_search(grid.method or name, values, grid.datasets, tuning.common(), folder, tuning.workers)
        write(table, target / f"{name}.csv")
        chosen.append({"Search": name, "Datasets": " ".join(grid.datasets), **best_row(table, tuning.tolerance)})
    for name, bisection in tuning.bisect.items():
        for dataset in tuning.datasets:
            low, high = bisection.ranges.get(dataset, (bisection.low, bisection.high))
            table = bisect_sparsity(
                name, bisection.setting, low, high, tuning.target_of(dataset),
                bisection.fixed, [dataset],
                {**tuning.common(), "limit": tuning.bisect_limit}, folder, tolerance=BISECT_TOLERANCE,
                workers=tuning.workers,
            )  # fmt: skip
            table = table.drop(columns=["Score", "Difference"])  # a budget is matched, whatever the answers are
            write(table, target / f"matched_{name}_{dataset}.csv")
            chosen.append({"Search": f"matched_{name}", "Datasets": dataset, **bisection.fixed, **table.iloc[0]})
    result = pd.DataFrame(chosen)
    write(result, target / "chosen.csv")
    return result


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, scores and sparsities to four places."""
    partial = path.with_name(f"{path.name}.partial")
    table.round(4).to_csv(partial, index=False)
    partial.replace(path)
