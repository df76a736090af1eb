"""Confidence intervals and paired comparisons of the tables."""

import math
from collections.abc import Iterable

import numpy as np

from focuslib.cells import CellResult

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def proportion_interval(right: float, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, 0 … 1."""
    p, z2 = right / asked, Z95**2
    centre = (p + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z95 / (1 + z2 / asked) * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval (normal approximation); the half width is 0 for one value."""
    values = np.asarray(list(values), dtype=float)
    half = Z95 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(half)


def paired_difference(base: CellResult, other: CellResult) -> tuple[float, float]:
    """Mean score difference on the questions both answered, and its 95 % half width.

    The width is that of Bonett and Price (2012), as if one more question had been won and one lost: a few questions on
    which the two agree do not show that they always would.
    """
    scores = {(s["task"], s["doc_id"]): s["score"] for s in base.samples}
    pairs = [s["score"] - scores[s["task"], s["doc_id"]] for s in other.samples if (s["task"], s["doc_id"]) in scores]
    return float(np.mean(pairs)), Z95 * float(np.std([*pairs, 1, -1])) / math.sqrt(len(pairs) + 2)


def mcnemar(base: CellResult, other: CellResult) -> tuple[int, int, float]:
    """Questions only `base` got right, only `other` got right, and the exact two-sided McNemar p-value."""
    scores = {(s["task"], s["doc_id"]): s["score"] > 0.5 for s in base.samples}
    pairs = [
        (scores[s["task"], s["doc_id"]], s["score"] > 0.5) for s in other.samples if (s["task"], s["doc_id"]) in scores
    ]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    return lost, won, min(1.0, 2 * tail)
