"""What an accelerator is asked to run: one prefill of a model, and everything known of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from focuslib.errors import UserError
from focuslib.hardware.accelerators import ADAPTIV, CMC, DENSE, Accelerator
from focuslib.hardware.baselines import adaptiv_cost, cmc_cost, systolic_cost
from focuslib.hardware.cost import Cost
from focuslib.hardware.focus import focus_cost, schedule_counts
from focuslib.hardware.traces import read_counts
from focuslib.prefill.ops import SITES, Counts, DecoderShape

# What an accelerator needs that may not be there, and where it comes from.
LACKS = {
    "adaptiv": "no row in adaptiv_sparsity.csv; run the baselines",
    "cmc": "no row in cmc_sparsity.csv, or frames unknown; run the baselines",
    "focus": "no trace (focus_main/*.pth or cells/*.trace); run the main experiment",
    "focus_sec_only": "neither a trace nor a schedule; run the main experiment",
}


@dataclass(frozen=True)
class Workload:
    """One prefill of a model on a data set.

    tokens: S. frames: of the video, None if unknown. adaptiv: AdapTiV's sparsity. cmc: CMC's linear, query and score
    sparsities. schedule: Focus's selected layers and retention, enough for SEC alone. trace: the file with Focus's
    counts, or the counts. basis: where the numbers are from, for tables. source: the file or folder, for errors.
    """

    model: str
    dataset: str
    shape: DecoderShape
    tokens: int
    frames: int | None = None
    adaptiv: float | None = None
    cmc: tuple[float, float, float] | None = None
    schedule: tuple[Sequence[int], Sequence[float]] | None = field(default=None, hash=False)
    trace: Path | Counts | None = field(default=None, hash=False)
    basis: str = "ours"
    source: str = ""

    def __str__(self) -> str:
        return f"{self.model} × {self.dataset}"

    def with_counts(self) -> Workload:
        """The same with its trace read. Raises UserError if that is of another shape than the row or the decoder."""
        if self.trace is None or isinstance(self.trace, Counts):
            return self
        counts, frames = read_counts(self.trace)
        check_counts(counts, self.shape, self.tokens, str(self.trace))
        if frames and self.frames and frames != self.frames:
            raise UserError(f"{self.trace}: {frames} frames, but {self.source} says {self.frames}; run both again")
        return replace(self, trace=counts)

    def has(self, name: str) -> bool:
        """Whether the numbers that an accelerator needs are there."""
        return {
            "dense": True,
            "adaptiv": self.adaptiv is not None,
            "cmc": self.cmc is not None and self.frames is not None,
            "focus": self.trace is not None,
            "focus_sec_only": self.trace is not None or self.schedule is not None,
        }[name]


def check_counts(counts: Counts, shape: DecoderShape, tokens: int, name: str) -> None:
    """Refuse counts of other layers, tokens or vectors than a decoder and a prompt have. name: of their file."""
    if len(counts.layers) != shape.layers:
        raise UserError(f"{name}: {len(counts.layers)} layers; the model's decoder has {shape.layers}, name its own")
    if counts.tokens != tokens:
        raise UserError(
            f"{name}: {counts.tokens} visual tokens, but meta_data.csv says {tokens}; write both by the same run"
        )
    for layer, sites in enumerate(counts.layers):
        if missing := [site for site in SITES if site not in sites]:
            raise UserError(f"{name}: layer {layer} has no counts of {missing[0]}; record the trace of Focus anew")
    low, high = 1, math.inf  # the sizes that a vector can have, for every site at once
    for site in SITES:
        vectors, channels = counts.layers[0][site].vectors, shape.site_channels(site)
        low = max(low, -(-channels // vectors))
        high = min(high, -(-channels // (vectors - 1)) - 1 if vectors > 1 else math.inf)
    if low > high:
        found = ", ".join(f"{site} {counts.layers[0][site].vectors}" for site in SITES)
        raise UserError(
            f"{name}: vectors a token ({found}) that fit no vector size of one {shape.hidden} wide with an MLP of "
            f"{shape.mlp}; name the model that was traced"
        )


def run(workload: Workload, design: Accelerator, *, corrected: bool = False) -> Cost:
    """What a workload costs on an accelerator. corrected: see focus.focus_cost.

    Raises UserError if the workload lacks what the accelerator needs.
    """
    shape, tokens = workload.shape, workload.tokens
    if design.name == DENSE.name:
        return systolic_cost(shape, tokens)
    if design.name == ADAPTIV.name and workload.adaptiv is not None:
        return adaptiv_cost(shape, tokens, workload.adaptiv)
    if design.name == CMC.name and workload.cmc is not None and workload.frames is not None:
        return cmc_cost(shape, tokens, workload.frames, *workload.cmc)
    if workload.has(design.name):
        counts = workload.with_counts().trace
        if counts is None and workload.schedule is not None:
            layers, retention = workload.schedule
            counts = schedule_counts(shape, tokens, layers, retention)
        if isinstance(counts, Counts):
            return focus_cost(shape, counts, design, corrected=corrected)
    raise UserError(f"{workload.source}: {workload}: {LACKS[design.name]}, or leave {design.name} out")
