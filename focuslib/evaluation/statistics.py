"""Confidence intervals and paired comparisons of scores: arrays in, numbers out."""

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm

SATURATED = 99.0  # percent of right answers from which a score no longer tells methods apart
Z95 = float(norm.ppf(0.975))  # two-sided 95 % of the normal distribution


def proportion_interval(right: float, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, 0 … 1. right: how many of `asked`, rounded to a whole number."""
    interval = binomtest(round(right), asked).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(groups: list[ArrayLike], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of a score that is the mean over groups of each group's mean. groups: scores of questions, 0 … 1.

    One group of right and wrong answers has Wilson's interval. Of several, each group's share is drawn from its
    Jeffreys posterior, a bootstrap that has a width where every answer is right; scores in between are resampled. The
    interval always holds the score itself.
    """
    arrays = [np.asarray(group, dtype=float) for group in groups]
    score = float(np.mean([group.mean() for group in arrays]))
    binary = all(np.isin(group, (0, 1)).all() for group in arrays)
    if binary and len(arrays) == 1:
        return proportion_interval(arrays[0].sum(), len(arrays[0]))
    rng = np.random.default_rng(seed)
    if binary:
        shares = [rng.beta(g.sum() + 0.5, len(g) - g.sum() + 0.5, draws) for g in arrays]
    else:
        shares = [g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in arrays]
    low, high = np.quantile(np.mean(shares, axis=0), (0.025, 0.975))
    return min(float(low), score), max(float(high), score)


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


def area_weights(sparsities: ArrayLike, upto: float) -> np.ndarray | None:
    """What each point's accuracy weighs in a curve's mean accuracy from no sparsity up to `upto`; they sum to 1.

    The curve begins with the dense score at 0 and is linear between points, sorted by sparsity; a point of no or
    negative sparsity stands at 0 beside dense, and where several stand at one sparsity the curve steps there.
    sparsities: [K], of the points. upto: above 0, in the same unit.

    Returns [1 + K] weights, of dense and of the points in the order given; None if no point reaches `upto`: the curve
    is not extended beyond its last point.
    """
    at = np.concatenate([[0.0], np.clip(np.asarray(sparsities, dtype=float), 0, None)])
    if not at.max() >= upto:
        return None
    weights, order = np.zeros(len(at)), np.argsort(at, kind="stable")
    for left, right in pairwise(order):
        width = at[right] - at[left]
        if at[left] >= upto or not width:
            continue
        part = min(width, upto - at[left]) / width  # of the segment that lies below `upto`
        weights[left] += part * width * (1 - part / 2)
        weights[right] += part * width * part / 2
    return weights / upto


def bootstrap_means(groups: list[np.ndarray], seed: int = 0, draws: int = 2000) -> np.ndarray:
    """Means over groups of each group's mean, in bootstrap samples of the questions: paired, for methods alike.

    groups: [N, M] each, M values of N questions; a sample draws the same questions for all M. Returns [draws, M].
    """
    rng = np.random.default_rng(seed)
    means = []
    for group in groups:
        counts = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), draws)
        means.append(counts @ np.asarray(group, dtype=float) / len(group))
    return np.mean(means, axis=0)


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values corrected for being several (Holm 1979): with all below .05, at most one in twenty such tables errs.

    p_values: [N], NaN where there was no test. Returns [N].
    """
    p = np.asarray(p_values, dtype=float)
    corrected = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def mcnemar(base: ArrayLike, other: ArrayLike) -> tuple[int, int, float]:
    """Questions only `base` got right, only `other` got right, and the exact two-sided McNemar p-value.

    base, other: [N] scores of the same questions; above .5 is right.
    """
    base, other = np.asarray(base) > 0.5, np.asarray(other) > 0.5
    lost, won = int((base & ~other).sum()), int((other & ~base).sum())
    return lost, won, float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
