"""The bar over all notebooks guesses the time that is left from the work, not from the number of cells."""

import pytest

from focuslib.experiments import progress
from focuslib.experiments.cell import make_cell
from focuslib.experiments.published import UNKNOWN, expected_work, seconds_a_question

COMMON = {"model": "tiny_onevision", "dataset": "tinyvideo_motion", "device": "cpu", "dtype": "float32", "seed": 0}


def cell(kind="accuracy", limit: int | None = 100, **what):
    return make_cell(kind, method="dense", limit=limit, **{**COMMON, **what})


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, and no announcement from outside."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setenv("FOCUSLIB_PROGRESS", "")  # so that what is announced here is taken back at the end
    monkeypatch.delenv("FOCUSLIB_PROGRESS")
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


def test_notebooks_go_on_where_the_one_before_ended(clock):
    first, second, later = [cell(limit=50)], [cell(limit=30, seed=1)], [cell(limit=20, seed=2)]
    progress.announce(first, second, later, clock[0])
    clock[0] += 600
    with progress.Bar(second, "baselines") as bar:
        assert (bar.bar.n, bar.bar.total) == (1, 3)
        clock[0] += 60
        bar.step(second[0], True)
        assert text(bar) == "11 min, about 1 min left"  # 20 questions at 30 a minute
    more = cell("view", 1)
    with progress.Bar([more], "the same notebook, what was not announced") as bar:
        clock[0] += 60
        bar.step(more, True)
        assert (bar.bar.n, bar.done, text(bar)) == (2, 80, "12 min")
