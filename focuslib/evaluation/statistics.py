"""Confidence intervals and paired comparisons of scores: arrays in, numbers out."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm

Z95 = float(norm.ppf(0.975))  # two-sided 95 % of the normal distribution


def proportion_interval(right: float, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, 0 … 1. right: how many of `asked`, rounded to a whole number."""
    interval = binomtest(round(right), asked).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval (normal approximation); the half width is 0 for one value."""
    values = np.asarray(values, dtype=float)
    half = Z95 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(half)


def paired_difference(base: ArrayLike, other: ArrayLike) -> tuple[float, float]:
    """Mean of other − base over the same questions, and its 95 % half width. base, other: [N] scores, 0 … 1.

    The width is that of Bonett and Price (2012), as if one more question had been won and one lost: a few questions on
    which the two agree do not show that they always would.
    """
    pairs = np.asarray(other, dtype=float) - np.asarray(base, dtype=float)
    return float(pairs.mean()), Z95 * float(np.std([*pairs, 1, -1])) / np.sqrt(len(pairs) + 2)


def mcnemar(base: ArrayLike, other: ArrayLike) -> tuple[int, int, float]:
    """Questions only `base` got right, only `other` got right, and the exact two-sided McNemar p-value.

    base, other: [N] scores of the same questions; above .5 is right.
    """
    base, other = np.asarray(base) > 0.5, np.asarray(other) > 0.5
    lost, won = int((base & ~other).sum()), int((other & ~base).sum())
    return lost, won, float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
