"""`focus plan`: the clock agrees with what can be worked out by hand, and the paper's profile keeps 64 GPUs busy."""

import pytest
from fakes import shards_of

from focuslib import cli
from focuslib.errors import UserError
from focuslib.experiments.forecast import forecast, simulate
from focuslib.experiments.paper import plan
from focuslib.experiments.published import published_hours
from focuslib.experiments.shards import Shard


def timed(folder, seconds, model="tiny_onevision"):
    """Shards of one question each."""
    shards = shards_of(folder, len(seconds), questions=1, model=model)
    return [
        Shard(shards[0].cell, shard.number, shard.count, shard.questions, {}, each)
        for shard, each in zip(shards, seconds, strict=True)
    ]


@pytest.mark.parametrize(
    ("workers", "loading", "expected"), [(1, 0, 60), (2, 0, 40), (3, 0, 30), (9, 0, 30), (1, 5, 65), (2, 5, 45)]
)
def test_the_clock_by_hand(tmp_path, workers, loading, expected):
    assert simulate([timed(tmp_path, [10, 20, 30])], workers, loading) == expected


def test_no_worker_waits_for_the_end_of_a_notebook(tmp_path):
    """On two workers: 30 and 10 + 20 of the second notebook, then its other 20."""
    assert simulate([timed(tmp_path, [10, 30]), timed(tmp_path, [20, 20])], 2, 0) == 50
    assert simulate([[shard] for shard in timed(tmp_path, [10, 20, 30])], 2, 0) == 40


def test_two_models_on_two_workers_are_loaded_once_each(tmp_path):
    shards = timed(tmp_path, [10] * 6) + timed(tmp_path, [10] * 6, "minicpm_v")
    assert simulate([shards], 2, 7) == 67
    assert simulate([shards], 1, 7) == 134


@pytest.fixture(scope="module")
def paper():
    return forecast("paper")


def test_the_paper_profile_on_64_gpus_is_near_the_ideal(paper):
    table = paper.table(price=2.0).set_index("GPUs")
    assert table.loc[1, "hours"] >= table.loc[1, "ideal hours"] == pytest.approx(paper.seconds / 3600)
    assert all(table["hours"] >= table["ideal hours"]) and all(table["hours"].diff().dropna() < 0)
    assert table.loc[64, "hours"] <= 1.1 * table.loc[64, "ideal hours"]
    assert table.loc[64, "cost"] == pytest.approx(64 * 2.0 * table.loc[64, "hours"])
    assert paper.chain() / 3600 < table.loc[64, "hours"]
    assert set(paper.unknown) == {"image", "methods"}  # of which the paper has no hours


def test_the_hours_are_the_published_ones(paper):
    hours = sum(shard.expected for shard in paper.notebooks["main"]) / 3600
    assert hours == pytest.approx(31 + 66 + 6, abs=0.2)  # dense, Focus, the traces; and a view
    cells = dict.fromkeys(shard.cell for shard in paper.notebooks["int8"])
    assert sum(published_hours(cell) or 0 for cell in cells) == pytest.approx(35 + 70)
    largest = max(cells := plan("baselines", "paper")[1], key=lambda cell: published_hours(cell) or 0)
    assert largest.method == "cmc" and len(cells) > 45


def test_a_profile_without_published_times_must_be_probed():
    with pytest.raises(UserError, match=r"profile laptop: no times are published for it; .*--probe"):
        forecast("laptop")


def test_a_probe_measures_here(monkeypatch):
    wanted = {"main": plan("main", "laptop")}
    monkeypatch.setattr("focuslib.experiments.forecast.EXPERIMENTS", wanted)
    found = forecast("laptop", probe=2)
    assert found.unknown == {} and found.seconds > 0 and found.loading > 0
    asked = sum(len(shard.questions) for shard in found.shards)
    assert asked == 3 * (240 + 240 + 240 + 10) + 1  # dense, Focus, dense on grey pictures, traces; a view


def test_the_command_prints_it(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--price", "2.5"])
    out = capsys.readouterr().out
    assert not ended.value.code and " 64 " in out and "longest chain" in out and "cost" in out and "shards" in out
