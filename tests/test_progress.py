"""The bar over cells guesses the time that is left from the work, not from the number of cells."""

import pytest

from focuslib.experiments import progress
from focuslib.experiments.cell import make_cell
from focuslib.experiments.published import UNKNOWN, expected_work, seconds_a_question

COMMON = {"model": "tiny_onevision", "dataset": "tinyvideo_motion", "device": "cpu", "dtype": "float32", "seed": 0}


def cell(kind="accuracy", limit: int | None = 100, **what):
    return make_cell(kind, method="dense", limit=limit, **{**COMMON, **what})


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    return now


def text(bar) -> str:
    return str(bar.bar.postfix)


def test_the_work_of_a_cell():
    assert expected_work(cell()) == 100 and expected_work(cell("view", 1)) == expected_work(cell("cost", 1)) == 1
    assert expected_work(cell(limit=None)) == UNKNOWN
    paper = cell(limit=None, model="llava_vid", dataset="videomme")
    seconds = seconds_a_question(paper)
    assert seconds and expected_work(paper) == pytest.approx(2700 * seconds)


def test_what_is_left_follows_the_work(clock):
    small, large = cell(limit=10), cell(limit=90)
    with progress.Bar([small, large], "main") as bar:
        clock[0] += 60
        bar.step(small, True)
        assert text(bar) == "1 min, about 9 min left"  # not one minute, as half of the cells would say
        bar.say("half", 45.0)
        assert text(bar) == "half, 1 min, about 1 min left"
        clock[0] += 120
        bar.step(large, True)
        assert text(bar) == "3 min, about 0 min left"


def test_results_that_were_there_took_no_time(clock):
    cells = [cell(limit=10, seed=seed) for seed in range(3)]
    with progress.Bar(cells, "main") as bar:
        clock[0] += 30
        bar.step(cells[0], False)
        assert text(bar) == "0 min"
        clock[0] += 90
        bar.step(cells[1], True)
        assert text(bar) == "2 min, about 2 min left"


def test_answers_that_were_there_took_no_time(clock):
    first, second = cell(limit=100), cell(limit=100, seed=1)
    with progress.Bar([first, second], "main") as bar:
        bar.found(80)
        bar.say("at once", 80.0)
        assert text(bar) == "at once, 0 min"
        clock[0] += 60
        bar.say("ten more", 90.0)
        assert text(bar) == "ten more, 1 min, about 11 min left"
        clock[0] += 60
        bar.step(first, True)
        assert text(bar) == "2 min, about 10 min left"


def test_cells_that_become_known_later_count_from_then_on(clock):
    first, further = cell(limit=50), cell(limit=20, seed=2)
    with progress.Bar([first], "reproduce") as bar:
        clock[0] += 300
        bar.step(first, True)
        assert text(bar) == "5 min, about 0 min left"
        bar.more([further])
        bar.say("on it", 0.0)
        assert bar.bar.total == 2 and text(bar) == "on it, 5 min, about 2 min left"
        clock[0] += 120
        bar.step(further, True)
        assert text(bar) == "7 min, about 0 min left"
