"""The intervals in the tables, against closed forms, exact sums and known coverage."""

import math

import numpy as np
import pytest

from focuslib.evaluation.statistics import Z95, mcnemar, mean_interval, paired_difference, proportion_interval
from focuslib.experiments.cell import make_cell
from focuslib.experiments.store import CellResult, paired_scores

COMMON = {"model": "tiny_onevision", "dataset": "tinyvideo_motion", "limit": None, "device": "cpu", "dtype": "float32"}


def answered(scores) -> CellResult:
    cell = make_cell("accuracy", method="dense", seed=0, **COMMON)
    samples = [{"task": "t", "doc_id": number, "score": float(score)} for number, score in enumerate(scores)]
    return CellResult(cell, 100 * float(np.mean(scores)), samples, [], {})


def draw(rng, size: int, lost: float, won: float):
    """Right or wrong under two methods, of which one alone is right with the given chances."""
    kind = rng.choice(3, size, p=[lost, won, 1 - lost - won])
    both = rng.random(size) < 0.8
    return np.where(kind == 0, 1, np.where(kind == 1, 0, both)), np.where(kind == 0, 0, np.where(kind == 1, 1, both))


def test_the_paired_interval_is_bonett_and_prices():
    base, other = draw(np.random.default_rng(0), 120, 0.1, 0.05)
    difference, half = paired_difference(base, other)
    n = len(base)
    lost, won = ((base > other).sum() + 1) / (n + 2), ((other > base).sum() + 1) / (n + 2)
    assert difference == pytest.approx((other - base).mean())
    assert half == pytest.approx(Z95 * math.sqrt((lost + won - (won - lost) ** 2) / (n + 2)))


def test_agreeing_on_a_few_questions_is_no_proof():
    base = answered([1, 0, 1, 1] * 10)
    difference, half = paired_difference(*paired_scores(base, base))
    assert difference == 0 and 0.05 < half < 0.1


@pytest.mark.parametrize(
    ("size", "lost", "won"), [(40, 0.02, 0.02), (40, 0.1, 0.02), (120, 0.02, 0), (480, 0.02, 0.01)]
)
def test_the_paired_interval_covers_the_truth(size, lost, won):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        difference, half = paired_difference(*draw(rng, size, lost, won))
        covered += abs(difference - (won - lost)) <= half
    assert covered >= 930


def test_only_questions_that_both_answered_count():
    base, other = answered([1, 1, 0, 0]), answered([1, 0])
    assert paired_difference(*paired_scores(base, other))[0] == -0.5


@pytest.mark.parametrize("size", [40, 480])
def test_the_interval_of_a_score_covers_the_truth(size):
    rng = np.random.default_rng(2)
    for share in (0.25, 0.9, 0.99):
        bounds = [proportion_interval(right, size) for right in rng.binomial(size, share, 1000)]
        assert sum(low <= share <= high for low, high in bounds) >= 930


def test_mcnemar_is_the_exact_binomial():
    base, other = answered([1] * 9 + [0] * 1 + [1] * 5), answered([0] * 9 + [1] * 1 + [1] * 5)
    lost, won, p = mcnemar(*paired_scores(base, other))
    assert (lost, won) == (9, 1) and p == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(*paired_scores(base, base)) == (0, 0, 1.0)


def test_one_value_has_no_width():
    assert mean_interval([3.0]) == (3.0, 0.0)
