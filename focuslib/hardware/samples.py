"""What one answered question costs, from the numbers that a cell's result keeps of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from statistics import fmean
from typing import Any

from focuslib.errors import UserError
from focuslib.hardware.accelerators import ADAPTIV, CMC, DENSE, FOCUS, PUBLISHED_VECTOR, Accelerator
from focuslib.hardware.baselines import adaptiv_cost, cmc_cost, systolic_cost
from focuslib.hardware.cost import Cost
from focuslib.hardware.energy import energy
from focuslib.hardware.focus import focus_cost
from focuslib.kernels.similarity import num_vectors
from focuslib.prefill.ops import SITES, Counts, DecoderShape, SiteCounts
from focuslib.prefill.record import PrefillRecord

_NUMBERS = ("visual_tokens", "num_frames", "retained", "stats", "site_sparsity")  # that a cost depends on


def sample_cost(
    method: str, sample: dict[str, Any], shape: DecoderShape, vector_size: int = PUBLISHED_VECTOR
) -> tuple[Cost, Accelerator]:
    """What one answered question costs, from the numbers that a cell's result keeps of it, and where it ran.

    Focus, AdapTiV and CMC run on their own accelerators. Every other method that drops tokens runs on the dense array
    with those it leaves; what choosing them takes is not modelled.

    Parameters
    ----------
    method
        Name of the method.
    sample
        visual_tokens, num_frames, retained, stats and, of Focus, site_sparsity.
    shape
        Dimensions of the decoder.
    vector_size
        Channels of a vector of Focus in that run.

    Raises
    ------
    UserError
        If the sample lacks the numbers that the method's accelerator needs.
    """
    try:
        tokens, stats = sample["visual_tokens"], sample.get("stats") or {}
        if len(sample["retained"]) != shape.layers:
            raise UserError(f"{method}: a result of {len(sample['retained'])} layers; the decoder has {shape.layers}")
        if method == "focus":
            counts = _sample_counts(sample["site_sparsity"], sample["retained"], tokens, shape, vector_size)
            return focus_cost(shape, counts), FOCUS
        if method == "adaptiv":
            return adaptiv_cost(shape, tokens, stats["sparsity"]), ADAPTIV
        if method == "cmc":
            names = ("linear_sparsity", "query_sparsity", "attn_score_sparsity")
            return cmc_cost(shape, tokens, sample["num_frames"], *(stats[name] for name in names)), CMC
        retained = sample["retained"]
        first = round(tokens * (1 - stats["share_0"])) if "share_0" in stats else None  # FrameFusion, before layer 0
        return systolic_cost(shape, tokens, retained, first), DENSE
    except KeyError as error:
        raise UserError(f"{method}: its result has no {error.args[0]}, as cycles need; run its cell again") from error


def record_cost(method: str, record: PrefillRecord) -> tuple[Cost, Accelerator]:
    """What one prefill costs, from its record; see `sample_cost`. Focus's counts are taken as they are."""
    if record.counts.layers:
        return focus_cost(record.shape, record.counts), FOCUS
    sample = {
        "visual_tokens": record.grid.length,
        "num_frames": record.grid.num_frames,
        "retained": record.retained,
        "stats": record.stats,
    }
    return sample_cost(method, sample, record.shape)


def mean_estimate(
    method: str, samples: Iterable[dict[str, Any]], shape: DecoderShape, vector_size: int = PUBLISHED_VECTOR
) -> tuple[float, float]:
    """Mean time in seconds and energy in mJ of a run's answered questions; see `sample_cost`. nan without any."""
    numbers = [json.dumps({name: sample[name] for name in _NUMBERS if name in sample}) for sample in samples]
    figures = [_estimate(method, each, shape, vector_size) for each in numbers]
    if not figures:
        return float("nan"), float("nan")
    seconds, joules = zip(*figures, strict=True)
    return fmean(seconds), fmean(joules)


@lru_cache(maxsize=1 << 15)  # many questions cost the same, and several tables show the same ones
def _estimate(method: str, numbers: str, shape: DecoderShape, vector_size: int) -> tuple[float, float]:
    """Time in seconds and energy in mJ of one answered question. numbers: the sample's, as JSON."""
    cost, design = sample_cost(method, json.loads(numbers), shape, vector_size)
    return cost.seconds, energy(cost, design).total


def _sample_counts(
    sparsity: dict[str, list[float]], retained: list[int], tokens: int, shape: DecoderShape, vector_size: int
) -> Counts:
    """Counts from each site's share of vectors not computed. Zero vectors of present tokens count as similar."""
    counts = Counts(tokens)
    for layer, (before, after) in enumerate(zip([tokens, *retained[:-1]], retained, strict=True)):
        sites = {}
        for site in SITES:
            vectors = num_vectors(shape.site_channels(site), vector_size)
            empty = tokens - (after if site in ("gate_proj", "down_proj") else before)
            saved = round(sparsity[site][layer] * tokens * vectors)
            sites[site] = SiteCounts(vectors, zero=empty * vectors, similar=saved - empty * vectors, empty_tokens=empty)
        counts.layers.append(sites)
    return counts
