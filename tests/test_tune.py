"""The tuning command: a grid, and bisection of one setting to a target computation sparsity."""

import re

import pytest
from tiny_models import untrained_checkpoint

from focuslib import cli
from focuslib.errors import UserError
from focuslib.experiments.tune import best_row, bisect_sparsity, close, grid_search

TASKS = ["tinyvideo_motion_tune", "tinyvideo_attributes_tune"]


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    checkpoint = str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    return {
        "model": "tiny_onevision", "checkpoint": checkpoint, "limit": 2, "device": "cpu", "dtype": "float32", "seed": 0,
    }  # fmt: skip


def test_a_grid_has_a_row_a_setting_the_sparsest_first(common, tmp_path):
    grid = {"cost": ["0.7", "0.4"], "ratio_lower_bound": ["0.1"]}
    table = grid_search("framefusion", grid, TASKS, common, tmp_path, workers=2)
    assert list(table["cost"]) == ["0.4", "0.7"]
    # FrameFusion's budget is a share of tokens; what is counted is more, since attention is quadratic
    for counted, budget in zip(table["Computation sparsity"], (60, 30), strict=True):
        assert budget < counted < budget + 7
    assert not table["Difference"].isna().any()
    assert best_row(table, tolerance=200)["cost"] == "0.4"


def test_the_best_row_is_within_the_tolerance_or_loses_least(common, tmp_path):
    table = grid_search("framefusion", {"cost": ["0.7", "0.4"]}, TASKS[:1], common, tmp_path)
    table["Difference"] = [-9.0, -3.0]
    assert best_row(table, tolerance=5)["cost"] == "0.7"
    assert best_row(table, tolerance=1)["cost"] == "0.7"
    assert best_row(table, tolerance=10)["cost"] == "0.4"


def test_bisection_reaches_the_target(common, tmp_path):
    table = bisect_sparsity("adaptiv", "threshold", 0.0, 1.0, 40.0, {}, TASKS, common, tmp_path, tolerance=3)
    assert abs(table["Computation sparsity"][0] - 40) <= 3
    assert 0 < table["threshold"][0] < 1


def test_a_target_out_of_reach_is_one_line(common, tmp_path):
    with pytest.raises(UserError, match=r"adaptiv: threshold from 0\.9 to 1\.0 reaches .* not 99\.0 %"):
        bisect_sparsity("adaptiv", "threshold", 0.9, 1.0, 99.0, {}, TASKS[:1], common, tmp_path)


@pytest.mark.parametrize("rising", [True, False])
def test_closing_in_on_any_monotone_function(rising):
    tried = []

    def function(x):
        tried.append(100 * x**3 if rising else 100 * (1 - x**3))
        return tried[-1]

    close(function, 0.0, 1.0, 37.0, 0.01, 40, "f")
    assert abs(tried[-1] - 37) <= 0.01 and len(tried) < 25


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", *arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command(common, tmp_path, capsys):
    usual = ("--task", TASKS[0], "--checkpoint", common["checkpoint"], "--limit", "2", "--out", str(tmp_path))
    status, out, _ = command(capsys, *usual, "--method", "framefusion", "--grid", "cost=.5,.4", "--tolerance", "200")
    assert status == 0 and "sparsest within 200.0 points of dense: cost .4" in out
    bisect = ("--bisect", "threshold=0,1", "--target-sparsity", "40")
    status, out, _ = command(capsys, *usual, "--method", "adaptiv", *bisect)
    assert status == 0 and re.search(r"closest to 40.0 %: threshold 0\.\d+", out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--grid", "cost=.5", "--set", "cost=.4"), "--set goes with --bisect"),
        (("--bisect", "cost=.5"), "write NAME=LOW,HIGH with two numbers"),
        (("--bisect", "cost=.2,.8"), "--bisect needs --target-sparsity"),
        (("--grid", "costs=.5"), "unknown setting of framefusion 'costs'; did you mean cost?"),
        (("--grid", "cost=2"), "cost"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, line):
    target = ("--target-sparsity", "50") if arguments == ("--bisect", "cost=.5") else ()
    status, _, error = command(capsys, "--task", TASKS[0], "--method", "framefusion", *arguments, *target)
    assert status == 1 and line in error and "\n" not in error.strip()
