"""The settings of the laptop profile are those that the committed searches on the tune split choose."""

from pathlib import Path

import pandas as pd
import pytest

from focuslib.evaluation.settings import checked_entries, matching_settings, method_settings
from focuslib.experiments.params import read_params
from focuslib.experiments.tune import best_row
from focuslib.experiments.tuning import BISECT_TOLERANCE, Tuning, read_tuning
from focuslib.methods.settings import make_method

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "results" / "expected" / "laptop" / "tuning"


def tuning() -> Tuning:
    return read_tuning(ROOT / "params" / "laptop" / "tuning.yaml")


@pytest.mark.parametrize("search", tuning().grid)
def test_the_grids_choose_the_committed_settings(search):
    grid = tuning().grid[search]
    table = pd.read_csv(TABLES / f"{search}.csv")
    points = 1
    for values in grid.values.values():
        points *= len(values)
    assert len(table) == points
    best = best_row(table, tuning().tolerance)
    method = grid.method or search
    chosen = {name: best[name] for name in {**grid.values, **grid.fixed}}
    expected = make_method(method, {name: str(value) for name, value in chosen.items()})
    for dataset in grid.datasets:
        for name in (dataset, dataset.removesuffix("_tune")):
            settings = method_settings(method, "tiny_onevision", name)
            assert make_method(method, settings) == expected


@pytest.mark.parametrize("method", tuning().bisect)
def test_the_bisections_choose_the_matched_settings(method):
    params = read_params(ROOT / "params" / "laptop" / "baselines.yaml")
    matched = checked_entries(method, params["matched"][method])
    bisection = tuning().bisect[method]
    for dataset in tuning().datasets:
        name = dataset.removesuffix("_tune")
        closest = pd.read_csv(TABLES / f"matched_{method}_{name}.csv").iloc[0]
        assert abs(closest["Computation sparsity"] - tuning().target_of(dataset)) <= BISECT_TOLERANCE
        expected = {**bisection.fixed, bisection.setting: float(closest[bisection.setting])}
        assert matching_settings(matched, "tiny_onevision", name) == expected
