"""Curves: their cells, their areas, breakdowns, pairs and guesses, against cases worked out by hand."""

import io
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import untrained_checkpoint

from focuslib.errors import UserError
from focuslib.evaluation.guess import chance, guesses, majority
from focuslib.evaluation.left import pack_left, unpack_left
from focuslib.evaluation.lmms import question
from focuslib.evaluation.statistics import area_weights, bootstrap_means
from focuslib.experiments import paper
from focuslib.experiments.cell import make_cell
from focuslib.experiments.curves import CurvePoint, look_cells, looked_at, nearest_points
from focuslib.experiments.paper import SweepPoint, plan, points_of, sweep_points
from focuslib.experiments.params import experiment_params
from focuslib.experiments.runner import load_cell
from focuslib.experiments.store import CellResult, Outcome, read_status
from focuslib.methods.settings import make_method
from focuslib.models.media import Clip
from focuslib.models.media import blank as grey_picture
from focuslib.report import notebook as report
from focuslib.report.curves import mean_over_datasets

COMMON = {"model": "tiny_onevision", "limit": 4, "device": "cpu", "dtype": "float32", "seed": 0}
DATASETS = ["tinyvideo_needle", "tinyvideo_motion"]
CURVES = {
    "sic": {"method": "focus", "settings": {"retention": [], "selected_layers": []}, "family": "ours",
            "points": [{"similarity_threshold": 0.9}, {"similarity_threshold": 0.5}]},
    "random": {}, "fastv": {"targets": [0.2, 0.4, 0.6], "settings": {"layer": 1}},
}  # fmt: skip
SMALL = {name: CURVES[name] for name in ("sic", "random")}


def planned(**changes):
    return plan("curves", "laptop", {"curves": CURVES, "targets": [0.3, 0.6], "datasets": DATASETS, **changes})


def result(cell, scores, sparsity=0.0, **facts) -> CellResult:
    """A cell's result; facts: name → one value a question."""
    samples = [
        {"task": cell.dataset, "doc_id": number, "score": float(score), "computation_sparsity": sparsity,
         "answer": "B", **{name: values[number] for name, values in facts.items()}}
        for number, score in enumerate(scores)
    ]  # fmt: skip
    return CellResult(cell, 100 * float(np.mean(scores)), samples, [], {})


def point(curve, method, scores, sparsity, dataset="tinyvideo_motion", **facts):
    cell = make_cell("accuracy", method=method, dataset=dataset, settings={"target_sparsity": sparsity}, **COMMON)
    return CurvePoint(curve, "family", f"target_sparsity {sparsity}", cell), result(cell, scores, sparsity, **facts)


def made_up(tmp_path, *found, dense=(1, 1, 1, 0), failed=None, **facts) -> tuple[Outcome, list[CurvePoint]]:
    """An outcome of made-up points and of dense."""
    datasets = dict.fromkeys(point.cell.dataset for point, _ in found)
    base = [result(make_cell("accuracy", method="dense", dataset=name, **COMMON), dense, **facts) for name in datasets]
    return Outcome(tmp_path, [*base, *(r for _, r in found)], failed=failed or {}), [point for point, _ in found]


def test_which_cells():
    params, cells = planned()
    assert [(cell.method, cell.dataset) for cell in cells[:2]] == [("dense", name) for name in DATASETS]
    points = points_of(params)
    assert [cell for cell in cells if cell.method != "dense"] == [point.cell for point in points]
    first = [point for point in points if point.cell.dataset == DATASETS[0]]
    assert [(point.curve, point.family, point.setting) for point in first] == [
        ("sic", "ours", "similarity_threshold 0.9"), ("sic", "ours", "similarity_threshold 0.5"),
        ("random", "methods", "target_sparsity 0.3"), ("random", "methods", "target_sparsity 0.6"),
        ("fastv", "methods", "target_sparsity 0.2"), ("fastv", "methods", "target_sparsity 0.4"),
        ("fastv", "methods", "target_sparsity 0.6"),
    ]  # fmt: skip
    assert first[0].cell.settings["selected_layers"] == [] and first[-1].cell.settings["layer"] == 1
    assert {cell.limit for cell in cells} == {params["limit"]}


def test_the_laptops_curves():
    """Every method has six points or more, and the halves of Focus are curves of their own."""
    params = experiment_params("curves", "laptop")
    points = points_of(params)
    counts = {curve: sum(point.curve == curve for point in points) for curve in params["curves"]}
    assert min(counts.values()) >= 6 * len(params["datasets"]) and len(counts) >= 17
    alone = {
        curve: [point.cell.settings for point in points if point.curve == curve]
        for curve in ("focus, SEC alone", "focus, SIC alone")
    }
    assert all(settings["sec_only"] for settings in alone["focus, SEC alone"])
    assert not any(settings["selected_layers"] or settings["sec_only"] for settings in alone["focus, SIC alone"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"curves": {"fastvv": {}}}, "unknown method 'fastvv'; did you mean fastv?"),
        ({"curves": {"a": {"method": "cmcc"}}}, "unknown method 'cmcc'; did you mean cmc?"),
        ({"curves": {"focus": {}}}, "curves.focus: focus meets no target; give points, a list of its settings"),
        ({"curves": {"focus": {"points": [{"vector_size": 16}]}}}, "a curve needs at least 2"),
        ({"curves": {"random": {"targets": [0.5]}}}, "curves.random.targets is [0.5]; a curve needs at least 2"),
        ({"curves": {"random": {"targets": [0.5, 1.5]}}}, "curves.random.targets[1] is 1.5"),
        ({"curves": {"random": {"targets": [0.1, 0.2], "points": [{}, {}]}}}, "has points and targets; give one"),
        ({"curves": {"focus": {"points": [{"tau": 1}, {}]}}}, "unknown setting of focus 'tau'"),
        ({"curves": {}}, "curves is {}"),
        ({"targets": [0.5]}, "targets is [0.5]; a curve needs at least 2"),
        ({"upto": 100}, "upto is 100; it must be less than 100"),
        ({"upto": 0}, "upto is 0; it must be more than 0"),
        ({"near": 120}, "near is 120"),
        ({"looks": -1}, "looks is -1; it must be at least 0"),
    ],
)
def test_mistakes_are_one_line(changes, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        planned(**changes)
    assert "\n" not in str(error.value)


def test_the_area_worked_out_by_hand():
    """1 at 0, .8 at 40, .4 at 80; up to 60: (40 · .9 + 20 · (.8 + .6) / 2) / 60."""
    weights = area_weights([80, 40], 60)
    assert weights is not None
    assert weights @ [1, 0.4, 0.8] == pytest.approx((40 * 0.9 + 20 * 0.7) / 60)
    assert area_weights([20, 59.9], 60) is None and area_weights([], 60) is None
    exact = area_weights([60], 60)
    assert exact is not None and exact.tolist() == [0.5, 0.5]
    stepped = area_weights([-3, 30, 30, 60], 60)  # at no sparsity beside dense; down at 30 without width
    assert stepped is not None and stepped @ [1, 0.9, 0.9, 0.5, 0.5] == pytest.approx(0.7)


@given(st.lists(st.floats(-5, 99), min_size=1, max_size=8), st.floats(1, 99), st.floats(0, 1))
def test_weights_sum_to_one_and_keep_a_constant(sparsities, upto, score):
    weights = area_weights(sparsities, upto)
    assert (weights is None) == (max(sparsities) < upto)
    if weights is not None:
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert weights @ np.full(len(weights), score) == pytest.approx(score)


def test_the_bootstrap_is_paired_and_repeats_by_seed():
    rng = np.random.default_rng(0)
    base = rng.random((50, 1)).round()
    group = np.concatenate([base, base, 1 - base], axis=1)
    drawn = bootstrap_means([group, np.ones((7, 3))], seed=3, draws=500)
    assert drawn.shape == (500, 3) and np.array_equal(drawn, bootstrap_means([group, np.ones((7, 3))], 3, 500))
    assert not np.array_equal(drawn, bootstrap_means([group, np.ones((7, 3))], 4, 500))
    assert np.array_equal(drawn[:, 0], drawn[:, 1]) and np.allclose(drawn[:, 0] + drawn[:, 2], 1.5)
    assert drawn[:, 0].mean() == pytest.approx((base.mean() + 1) / 2, abs=0.01)
    assert drawn[:, 0].std() == pytest.approx(base.std() / np.sqrt(50) / 2, rel=0.1)


def test_the_areas(tmp_path):
    outcome, points = made_up(
        tmp_path,
        point("far", "random", [1, 0, 0, 0], 0.8), point("far", "random", [1, 1, 0, 0], 0.4),
        point("near", "uniform", [1, 1, 1, 1], 0.3), point("near", "uniform", [1, 1, 1, 1], 0.5),
    )  # fmt: skip
    table = report.areas_table(outcome, points, 60).set_index("Curve")
    assert table.loc["dense", "Area"] == 75 and table.loc["dense", "Of dense"] == 100
    assert table.loc["far", "Area"] == pytest.approx((40 * 62.5 + 20 * 43.75) / 60)
    assert table.loc["far", "Of dense"] == pytest.approx(table.loc["far", "Area"] / 0.75)
    assert table.loc["far", "Area, low"] < table.loc["far", "Area"] < table.loc["far", "Area, high"]
    assert np.isnan(table.loc["near", "Area"]) and np.isnan(table.loc["near", "Area, low"])
    assert table.loc["near", "Note"] == "60 % not reached on tinyvideo_motion" and table.loc["far", "Note"] == ""
    again = report.areas_table(outcome, points, 60).set_index("Curve")
    assert again.equals(table)
    report.write_curves(outcome, points, 60)
    assert {path.name for path in tmp_path.glob("*.csv")} == {"curves.csv", "curve_areas.csv"}


def test_the_table_and_the_figure(tmp_path):
    found = [
        point("fast", "random", [1, 0, 0, 0], at, dataset) for at in (0.3, 0.6) for dataset in DATASETS
    ]  # fmt: skip
    lost = point("slow", "uniform", [0] * 4, 0.9)[0]
    outcome, points = made_up(tmp_path, *found, failed={lost.cell: "cannot be met"})
    table = report.curves_table(outcome, [*points, lost])
    assert len(table) == 2 + 4 + 1
    row = table[table["Curve"] == "fast"].iloc[0]
    assert (row["Questions"], row["Right"], row["Computation sparsity"], row["Minus dense"]) == (4, 25, 30, -50)
    assert table.iloc[-1]["Note"] == "cannot be met" and table.iloc[-1]["Questions"] == 0
    figure = report.curves_figure(table)
    assert figure is not None and len(figure.axes) == 3  # a panel a data set, and their mean
    means = mean_over_datasets(table[table["Questions"] > 0])
    assert list(means["Curve"]) == ["dense", "fast", "fast"] and means["Questions"].tolist() == [8, 8, 8]
    assert means["±"].iloc[1] == pytest.approx(row["±"] / np.sqrt(2))
    assert report.curves_figure(report.curves_table(Outcome(tmp_path), [])) is None


def test_tables_and_figures_of_nothing(tmp_path):
    """A notebook whose cells all failed, or those of dense, still says why."""
    found = [point("fast", "random", [1, 0, 0, 0], at) for at in (0.3, 0.6)]
    points = [point for point, _ in found]
    for outcome in (Outcome(tmp_path), Outcome(tmp_path, [result for _, result in found])):
        tables = (
            report.areas_table(outcome, points, 60), report.guessers_table(outcome.results),
            report.pairs_table(report.near_results(outcome, points, 60, 2)),
            report.breakdown_table(report.near_results(outcome, points, 60), "difficulty"),
        )  # fmt: skip
        assert all(table.empty for table in tables)
        assert (report.curves_figure(report.curves_table(outcome, points)) is None) == (not outcome.results)
        assert list(report.looks_figures(outcome, points, 60)) == []
        report.write_curves(outcome, points, 60)


def test_which_methods_are_compared_as_equal(tmp_path):
    found = [point("hits", "random", [1, 0, 0, 0], at, name) for at in (0.5, 0.74) for name in DATASETS]
    found += [
        point("misses", "uniform", [1, 0, 0, 0], at, name) for at, name in zip((0.75, 0.8), DATASETS, strict=True)
    ]
    found += [point("absent", "evs", [1, 0, 0, 0], 0.75, DATASETS[0])]
    outcome, points = made_up(tmp_path, *found)
    chosen = nearest_points(points, outcome.results, 75)
    assert chosen["hits", "tiny_onevision", DATASETS[0]][0].setting == "target_sparsity 0.74"
    names = [name for _, name in report.near_results(outcome, points, 75, within=2)]
    assert names == ["dense", "hits"]
    assert [name for _, name in report.near_results(outcome, points, 75)] == ["dense", "hits", "misses", "absent"]


def test_pairs_are_corrected_over_all_pairs(tmp_path):
    rng = np.random.default_rng(0)
    good = np.ones(60)
    found = [
        point("bad", "random", np.zeros(60), 0.75), point("middle", "uniform", rng.random(60).round(), 0.75),
        point("good", "evs", good, 0.75),
    ]  # fmt: skip
    outcome, points = made_up(tmp_path, *found, dense=good)
    pairs = report.pairs_table(report.near_results(outcome, points, 75, within=2))
    assert len(pairs) == 6 and (pairs["p (Holm)"] >= pairs["p"]).all()
    top = pairs.iloc[0]
    assert (top["Better"], top["Worse"], top["Difference"], top["Questions"]) == ("dense", "bad", 100, 60)
    assert pairs[(pairs["Better"] == "dense") & (pairs["Worse"] == "good")]["p"].item() == 1
    assert len(report.significant_pairs(pairs)) == 5
    assert report.pairs_sentence(pairs).startswith("5 of 6 pairs of 4 methods differ at p < 0.01")
    assert report.pairs_sentence(report.pairs_table({})) == "No two methods can be compared."


def test_the_breakdown(tmp_path):
    facts = {"difficulty": [1, 1, 5, 5], "question_type": ["a", "b", "a", "b"]}
    outcome, points = made_up(tmp_path, point("random", "random", [1, 0, 0, 0], 0.75, **facts), **facts)
    chosen = report.near_results(outcome, points, 75)
    table = report.breakdown_table(chosen, "difficulty").set_index("Method")
    assert table.columns.tolist() == [
        "Model", "Computation sparsity", "difficulty 1 (2)", "difficulty 5 (2)", "all (4)",
    ]  # fmt: skip
    assert table.loc["dense"].tolist()[1:] == [0, 100, 50, 75] and table.loc["random"].tolist()[1:] == [75, 50, 0, 25]
    kinds = report.breakdown_table(chosen, "question_type")
    assert "question type a (2)" in kinds
    without, points = made_up(tmp_path, point("random", "random", [1, 0, 0, 0], 0.75))
    assert report.breakdown_table(report.near_results(without, points, 75), "difficulty").empty


def test_a_matched_comparison_is_broken_down_on_its_own_questions(tmp_path):
    """Dense was asked more questions; those count that all were asked."""
    dense = make_cell("accuracy", method="dense", dataset="tinyvideo_motion", **COMMON)
    matched = make_cell("matched", method="adaptiv", dataset="tinyvideo_motion", **COMMON)
    results = [result(dense, [1, 1, 0, 0], difficulty=[1, 2, 1, 2]), result(matched, [0, 1], difficulty=[1, 2])]
    chosen = report.matched_results(results)
    table = report.breakdown_table(chosen, "difficulty").set_index("Method")
    assert table["difficulty 1 (1)"].tolist() == [100, 0] and table["all (2)"].tolist() == [100, 50]
    assert report.pairs_table(chosen)["Questions"].tolist() == [2]


def test_clips_are_drawn_by_kind_whatever_the_answers(tmp_path):
    kinds = ["a", "b"] * 10
    cell = make_cell("accuracy", method="dense", dataset="tinyvideo_motion", **COMMON)
    drawn = looked_at(result(cell, [0] * 20, question_type=kinds), 2, seed=0)
    assert drawn == looked_at(result(cell, [1] * 20, question_type=kinds), 2, seed=0)
    assert [kinds[number] for number in drawn] == ["a", "a", "b", "b"] and len(set(drawn)) == 4
    assert len(looked_at(result(cell, [0] * 20), 3, seed=0)) == 3
    found = [point("random", "random", [1] * 4, at) for at in (0.5, 0.75)]
    outcome, _ = made_up(tmp_path, *found)
    (view,) = look_cells(outcome.results, 1, 0)
    assert replace(view, sample=None) == replace(cell, kind="view", limit=1)
    assert look_cells([], 1, 0) == []


def test_guesses():
    docs = [
        {"question_type": kind, "options": ["red", "blue", "green", "tan"], "answer_text": answer}
        for kind, answer in (("colour", "red"), ("colour", "red"), ("colour", "blue"), ("other", "tan"))
    ]
    test = [{**docs[0], "answer_text": answer} for answer in ("red", "blue")]
    assert majority(docs, test) == [1, 0]
    assert majority(docs, [{**test[0], "options": ["green", "blue"], "answer_text": "blue"}]) == [1]
    assert majority([], test) == [0.25, 0.25] and chance(test) == [0.25, 0.25]
    found = guesses("tinyvideo_motion")
    assert found is not None and set(found) == {"chance", "majority"} and np.mean(found["chance"]) == 0.25
    assert guesses("videomme") is None and guesses("tinyvideo_motion_tune") is None


def test_dense_stands_beside_guessers(tmp_path):
    cell = make_cell("accuracy", method="dense", dataset="tinyvideo_motion", **COMMON)
    results = [result(cell, [1, 1, 1, 0]), result(replace(cell, kind="blank"), [0, 1, 0, 0])]
    row = report.guessers_table(results).iloc[0]
    assert (row["Questions"], row["Dense"], row["Chance"], row["Grey pictures"]) == (4, 75, 25, 25)
    assert row["Low"] < 75 < row["High"] and 0 <= row["Majority"] <= 100
    other = report.guessers_table([result(replace(cell, dataset="videomme"), [1, 0])]).iloc[0]
    assert other["Dense"] == 50 and "Majority" not in other
    assert report.guessers_table([]).empty


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The checkpoints of a run: the embedded model without its training."""
    return {"tiny_onevision": str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))}


@pytest.fixture(scope="module")
def done(untrained, tmp_path_factory):
    """The parameters and outcome of a run of the untrained model on a few questions."""
    folder = tmp_path_factory.mktemp("results")
    changes = {
        "checkpoints": untrained,
        "curves": SMALL, "targets": [0.3, 0.6], "datasets": DATASETS[1:], "limit": 2, "near": 60, "looks": 1,
        "workers": 1,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "results_folder", lambda name: folder)
        return experiment_params("curves", "laptop", changes), paper.run("curves", "laptop", changes)


def test_a_run_of_curves(done):
    params, outcome = done
    assert outcome.complete and read_status(outcome.folder, "curves")["complete"]
    kinds = Counter(result.cell.kind for result in outcome.results)
    questions = {result.cell.sample for result in outcome.results if result.cell.kind == "view"}
    assert kinds == {"accuracy": 5, "view": len(questions)} and questions
    scored = [result for result in outcome.results if result.cell.kind == "accuracy"]
    for sample in (sample for result in scored for sample in result.samples):
        assert sample["question_type"] and sample["target"] in "ABCD"
    table = report.curves_table(outcome, points_of(params))
    assert len(table) == 5 and set(table["Questions"]) == {2}
    again = paper.run_cells("curves", [result.cell for result in outcome.results], outcome.folder)
    assert again.ran == 0


def test_grey_pictures_are_not_the_clip(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "results_folder", lambda name: tmp_path)
    changes = {"checkpoints": untrained, "datasets": DATASETS[1:], "methods": ["dense"], "limit": 2, "workers": 1}
    outcome = paper.run("main", "laptop", changes)
    dense, blank = (next(r for r in outcome.results if r.cell.kind == kind) for kind in ("accuracy", "blank"))
    assert dense.cell.method == blank.cell.method == "dense"
    assert [s["visual_tokens"] for s in dense.samples] == [s["visual_tokens"] for s in blank.samples]
    vlm = load_cell(dense.cell)
    media, prompt = question("tinyvideo_motion", vlm.name, 0)
    clip = vlm.clip(media)
    assert isinstance(clip, Clip)
    grey = grey_picture(clip)
    assert isinstance(grey, Clip) and grey.times == clip.times and grey.frames.shape == clip.frames.shape
    answer = vlm.generate(grey, prompt, max_new_tokens=16)
    assert blank.samples[0]["answer"] == answer
    assert grey_picture(PIL.Image.new("RGB", (3, 2))).getpixel((0, 0)) == (128, 128, 128)


def test_what_each_method_drops_is_drawn(done):
    params, outcome = done
    figures = list(report.looks_figures(outcome, points_of(params), 60))
    questions = {result.cell.sample for result in outcome.results if result.cell.kind == "view"}
    assert len(figures) == len(questions)
    labels = [label.get_text().split(":")[0].split("\n")[0] for label in figures[0].axes[0].get_yticklabels()]
    assert labels == ["input", *SMALL]
    assert "; right: " in figures[0].get_suptitle() and "dense: " in figures[0].get_suptitle()
    assert list(report.looks_figures(outcome, [], 60)) == []
    picture = PIL.Image.open(io.BytesIO(report.few_colours(figures[0]).data))
    assert picture.mode == "P" and picture.width > 300


def test_the_tokens_that_are_left_are_those_of_the_method(done):
    """What a sample says is what the method leaves when it is asked again."""
    _, outcome = done
    for result in outcome.results:
        if result.cell.kind != "accuracy":
            continue
        sample, vlm = result.samples[0], load_cell(result.cell)
        media, prompt = question(result.cell.dataset, vlm.name, sample["doc_id"])
        with make_method(result.cell.method, result.cell.settings)(vlm) as run:
            vlm.prefill(vlm.prepare(media, prompt))
        assert ("left" in sample) == bool(run.last.kept)
        if run.last.kept:
            assert unpack_left(sample["left"], sample["visual_tokens"]).tolist() == run.last.left.tolist()


@given(tokens=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_left_tokens_survive_packing(tokens, seed):
    left = np.flatnonzero(np.random.default_rng(seed).random(tokens) < 0.5)
    assert unpack_left(pack_left(torch.from_numpy(left), tokens), tokens).tolist() == left.tolist()


def test_a_sweep_has_settings_of_its_own():
    sweep = {"dataset": "tinyvideo_motion", "values": [32, 16], "settings": {"similarity_threshold": 0.6}}
    params = experiment_params("dse", "laptop", {"sweeps": {"vector_size": sweep}})
    used = [point.accuracy.settings for point in sweep_points(params)]
    assert [(s["vector_size"], s["similarity_threshold"]) for s in used] == [(32, 0.6), (16, 0.6)]
    with pytest.raises(UserError, match="unknown setting of focus 'threshold'"):
        plan("dse", "laptop", {"sweeps": {"vector_size": {**sweep, "settings": {"threshold": 1}}}})


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (([1] * 40, [0] * 40), ("differ on 40 questions (-100.0", r"(-4.3 from 4096 to 8) appears.")),
        (([0] * 40, [1] * 40), ("differ on 40 questions (+100.0", r"(-4.3 from 4096 to 8) is reversed.")),
        (([1, 0] * 20, [0, 1] * 20), ("do not differ significantly on 40 questions (+0.0", "does not appear.")),
    ],
)
def test_a_sweeps_sentence_is_computed(tmp_path, scores, words):
    results, points = [], []
    for size, found in zip((256, 4), scores, strict=True):
        cell = make_cell(
            "accuracy", method="focus", dataset="tinyvideo_motion", settings={"vector_size": size}, **COMMON
        )
        results.append(result(cell, found))
        points.append(SweepPoint("vector_size", str(size), cell, cell, ""))
    said = report.sweep_sentence(Outcome(tmp_path, results), points, "vector_size")
    assert said.startswith("tiny_onevision, vector (channels): 256 and 4 ") and all(part in said for part in words)
    assert report.sweep_sentence(Outcome(tmp_path), points, "vector_size").startswith("No sweep")
