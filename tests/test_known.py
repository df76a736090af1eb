"""A question that a cell has asked is not asked again for another cell, and its result is as if it had been."""

import json
from dataclasses import replace

import pytest
from test_shards import Here
from tiny_models import untrained_checkpoint

from focuslib.experiments import runner, spread
from focuslib.experiments.cell import make_cell
from focuslib.experiments.runner import Workers, run_cells
from focuslib.experiments.store import result_file
from focuslib.models import TinyOnevision


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    settings = {"selected_layers": [1, 3, 5], "retention": [0.6, 0.4, 0.2], "vector_size": 16, "m_tile": 64}
    return make_cell(
        "accuracy", model="tiny_onevision", dataset="tinyvideo_motion", method="focus", settings=settings, limit=3,
        device="cpu", dtype="float32", seed=0, checkpoint=str(untrained_checkpoint(tmp_path_factory.mktemp("x"))),
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """A mark a question that the model answers; two workers are one in this process."""
    marks, original = [], TinyOnevision.generate_ids
    monkeypatch.setattr(TinyOnevision, "generate_ids", lambda *a, **k: marks.append(1) or original(*a, **k))
    monkeypatch.setattr(runner, "LocalEngine", lambda count: Here())
    return marks


def run(cell, folder, workers=1, before=()) -> dict:
    """Its result, without what no two runs share. before: cells that are run with it."""
    outcome = run_cells("main", [*before, cell], folder, workers=Workers(workers, shard=2))
    assert cell not in outcome.failed
    value = json.loads(result_file(cell, folder).read_text())
    value["provenance"].pop("seconds")
    for sample in value["samples"]:
        sample.pop("seconds")
    return value


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("change", [{"limit": 7}, {"limit": 2}, {"kind": "matched", "limit": 6}, {"kind": "ablation"}])
def test_what_was_asked_is_not_asked_again(cell, asked, tmp_path, workers, change):
    run(cell, tmp_path / "one", workers)
    asked.clear()
    other = replace(cell, **change)
    found = run(other, tmp_path / "one", workers)
    assert len(asked) == max(0, other.limit - 3)
    assert found["provenance"].pop("shared") == min(3, other.limit)
    asked.clear()
    alone = run(other, tmp_path / "other", workers)
    assert json.dumps(found) == json.dumps(alone)  # the order of names too
    assert len(asked) == other.limit


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("other", [{"kind": "trace", "limit": 2}, {"kind": "sparsity", "limit": 3}, {"limit": 5}])
def test_what_another_cell_of_the_same_run_asks_is_not_asked_again(cell, asked, tmp_path, workers, other):
    other, cell = replace(cell, **other), replace(cell, limit=7)
    found = run(cell, tmp_path / "both", workers, before=[other])
    assert len(asked) == 7
    assert found["provenance"].pop("shared") == other.limit
    assert json.dumps(found) == json.dumps(run(cell, tmp_path / "alone", workers))


def test_what_the_other_cell_did_not_answer_is_asked(cell, asked, tmp_path, monkeypatch):
    original = spread.choose_trace  # the last that is done for a trace
    monkeypatch.setattr(spread, "choose_trace", lambda of, *a: 1 / 0 if of.kind == "trace" else original(of, *a))
    found = run(replace(cell, limit=4), tmp_path, 2, before=[replace(cell, kind="trace", limit=2)])
    assert len(asked) == 6 and len(found["samples"]) == 4 and "shared" not in found["provenance"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        {"method": "dense", "settings": {}},
        {"settings": {"similarity_threshold": 0.5}},
        {"kind": "blank"},
        {"kind": "trace"},  # a trace is of a run
        {"frames": 4},
        {"dtype": "bfloat16"},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_may_differ_is_asked(cell, asked, tmp_path, workers, change):
    run(cell, tmp_path, workers)
    asked.clear()
    settings = {**cell.settings, **change.get("settings", {})} if change.get("method") is None else {}
    assert "shared" not in run(replace(cell, **{**change, "settings": settings}), tmp_path, workers)["provenance"]
    assert len(asked) == 3


def test_a_result_of_other_sources_is_of_no_use(cell, asked, tmp_path):
    run(cell, tmp_path)
    path = result_file(cell, tmp_path)
    path.rename(path.with_name(f"{path.stem[:-4]}0000.json"))  # the name has a digest of them
    (path.parent / f"accuracy_{cell.model}_{cell.dataset}_{cell.method}_old.json").write_text("[]")
    asked.clear()
    assert "shared" not in run(replace(cell, limit=4), tmp_path)["provenance"] and len(asked) == 4


def test_a_question_that_failed_is_asked_again(cell, asked, tmp_path):
    run(cell, tmp_path)
    path = result_file(cell, tmp_path)
    value = json.loads(path.read_text())
    value["samples"][1] |= {"error": "no such file", "answer": ""}
    path.write_text(json.dumps(value))
    asked.clear()
    assert run(replace(cell, limit=4), tmp_path)["provenance"]["shared"] == 2 and len(asked) == 2
