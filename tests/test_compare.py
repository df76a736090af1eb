"""The comparison at equal sparsity: its cells, its statistics, its table and its page."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import untrained_checkpoint

from focuslib import cli
from focuslib.errors import UserError
from focuslib.evaluation.statistics import holm, mcnemar
from focuslib.experiments.compare import compared_cells, method_names, settings_at
from focuslib.experiments.runner import run_cells
from focuslib.experiments.store import paired_scores
from focuslib.methods import METHODS
from focuslib.report.methods import (
    agreement,
    comparison_summary,
    kept_by_method_figure,
    methods_average,
    methods_figure,
    methods_table,
    write_page,
)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_equals_its_definition(values):
    """Sorted, the i-th smallest times how many are not smaller, never less than the one before, at most 1."""
    corrected = holm([*values, np.nan])
    assert np.isnan(corrected[-1])
    worst = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        worst = max(worst, min(1.0, values[index] * (len(values) - place)))
        assert corrected[index] == pytest.approx(worst)


def test_which_cells(tmp_path):
    checkpoint = str(untrained_checkpoint(tmp_path))
    common = {"model": "tiny_onevision", "checkpoint": checkpoint, "device": "cpu", "dtype": "float32", "seed": 0}
    pairs = [{"dataset": name, **common} for name in ("tinyvideo_motion", "tinyvideo_needle")]
    cells = compared_cells(pairs, ["fastv", "focus"], [0.5, 0.75], 3, {"fastv": {"layer": 1}})
    accuracy = [
        (cell.dataset, cell.method, cell.settings.get("target_sparsity")) for cell in cells if cell.kind == "accuracy"
    ]
    settings = [("dense", None), ("fastv", 0.5), ("fastv", 0.75), ("focus", None)]
    assert accuracy == [(pair["dataset"], *setting) for pair in pairs for setting in settings]
    assert {cell.settings["layer"] for cell in cells if cell.method == "fastv"} == {1}
    views = [(cell.dataset, cell.method) for cell in cells if cell.kind == "view"]
    assert views == [("tinyvideo_needle", "fastv"), ("tinyvideo_needle", "focus")]
    assert method_names(["all"]) == [name for name in METHODS if name != "dense"]
    assert method_names(["fastv", "all"])[0] == "fastv" and method_names(["random+focus"]) == ["random+focus"]
    assert settings_at("framefusion", 0.75) == {"target_sparsity": 0.75} and settings_at("focus", 0.75) is None


def test_mistakes_are_said():
    with pytest.raises(UserError, match=r"targets \[75\]: give sparsities between 0 and 1"):
        compared_cells([], ["fastv"], [75], None)
    with pytest.raises(UserError, match="unknown method 'fastvv'"):
        method_names(["fastvv"])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    checkpoint = str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    common = {"model": "tiny_onevision", "checkpoint": checkpoint, "device": "cpu", "dtype": "float32", "seed": 0}
    pairs = [{"dataset": "tinyvideo_motion", **common}]
    cells = compared_cells(pairs, ["random", "evs", "dycoke"], [0.5, 0.9], 4)
    return run_cells("compare", cells, tmp_path_factory.mktemp("results"))


def test_the_table(outcome):
    table = methods_table(outcome.results)
    rows = {(row["Method"], row["Target"]): row for _, row in table.iterrows()}
    assert len(table) == 6  # dense; random and EVS twice; DyCoke cannot reach .9
    assert [cell.method for cell in outcome.failed] == ["dycoke"] * 3  # the score, its cost and its view
    assert all("target_sparsity 0.9 cannot be met" in why for why in outcome.failed.values())
    for (method, target), row in rows.items():
        assert row["Questions"] == 4
        if method != "dense":
            assert row["Computation sparsity"] == pytest.approx(target, abs=1.5)
    by = {
        (r.cell.method, r.cell.settings.get("target_sparsity")): r for r in outcome.results if r.cell.kind == "accuracy"
    }
    pair = paired_scores(by["random", 0.5], by["evs", 0.5])
    assert rows["evs", 50]["Minus random"] == pytest.approx(100 * float(np.mean(np.subtract(pair[1], pair[0]))))
    assert rows["evs", 50]["p (random)"] >= mcnemar(*pair)[2]
    assert np.isnan(rows["random", 50]["p (random)"])
    same = [a["answer"] == b["answer"] for a, b in zip(by["dense", None].samples, by["evs", 0.5].samples, strict=True)]
    assert agreement(by["dense", None], by["evs", 0.5]) == np.mean(same)
    assert agreement(by["dense", None], by["dense", None]) == 1
    average = methods_average(table)
    assert len(average) == 6 and (average["Data sets"] == 1).all()


def test_a_method_that_cannot_run_is_one_row_that_says_why(outcome):
    plain, table = methods_table(outcome.results), methods_table(outcome.results, outcome.failed)
    assert len(table) == len(plain) + 1
    row = table.iloc[-1]
    assert (row["Method"], row["Target"], row["Questions"]) == ("dycoke", 90, 0)
    assert row["Note"].startswith("method dycoke: target_sparsity 0.9 cannot be met") and np.isnan(row["Right"])
    shared = [name for name in plain if name not in ("Questions", "Failed")]
    assert plain[shared].equals(table.iloc[:-1][shared])  # nothing else moves, the corrected p-values neither
    average = methods_average(table).iloc[-1]
    assert (average["Data sets"], average["Questions"], average["Note"]) == (0, 0, row["Note"])
    assert "dycoke" not in comparison_summary(outcome) and outcome.summary().count("dycoke") == 6
    assert methods_figure(table) is not None
    nothing = methods_table([], outcome.failed)
    assert len(nothing) == 1 and methods_figure(nothing) is None
    assert len(methods_average(nothing)) == 1


def test_figures_and_page(outcome, tmp_path):
    assert methods_figure(methods_table(outcome.results)) is not None
    figure = kept_by_method_figure(outcome)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == ["input", "random", "evs"]
    page = write_page(outcome, tmp_path / "deep" / "page.html", "tiny <model>").read_text()
    assert "tiny &lt;model&gt;" in page and page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"http", page)


def test_the_command(tmp_path, capsys):
    checkpoint = untrained_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(SystemExit) as ended:
        cli.main([
            "compare", "--task", "tinyvideo_motion", "--checkpoint", str(checkpoint), "--methods", "uniform",
            "--methods", "random+focus", "--sparsity", "0.5", "--limit", "2", "--out", str(tmp_path / "out"),
        ])  # fmt: skip
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "uniform" in said and "random+focus" in said
    assert (tmp_path / "out" / "compare.html").is_file() and (tmp_path / "out" / "methods.csv").is_file()


def test_the_command_takes_the_frames_of_a_video(monkeypatch):
    taken = []

    def stop(pairs, *_):
        taken.extend(pairs)
        raise UserError("far enough")

    monkeypatch.setattr("focuslib.experiments.compare.compared_cells", stop)
    with pytest.raises(SystemExit):
        cli.main(["compare", "--task", "tinyvideo_motion", "--frames", "4", "--fps", "0.5"])
    assert [(pair["frames"], pair["fps"]) for pair in taken] == [(4, 0.5)]
