"""Controls: what a method must beat. Visual tokens kept at random or evenly spaced (others: see fewer).

Two benchmarks of the field (arXiv 2511.02650, 2510.07143) found that such controls beat several published methods.
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.kernels.ranking import draw, drawn, evenly_spaced
from focuslib.kernels.semantic import tokens_to_keep
from focuslib.methods.base import Method
from focuslib.methods.budget import check_share, check_target, tokens_for
from focuslib.prefill.record import Prefill

DRAWN_BY = 64  # tokens that say which clip it is


@dataclass(frozen=True)
class Control(Method):
    """What the controls share: before layer 0 they keep a number of visual tokens; positions stay, nothing is computed.

    retention: share of the visual tokens that are kept. target_sparsity: keep what makes the counted sparsity this
    instead; None: retention holds.
    """

    retention: float = 0.25
    target_sparsity: float | None = None

    def __post_init__(self):
        check_share(self.name, "retention", self.retention)
        check_target(self.name, self.target_sparsity)

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        return hidden, prefill.keep(self.choose(prefill, hidden, self.keep(prefill)).to(hidden.device))

    def keep(self, prefill: Prefill) -> int:
        """How many visual tokens to keep."""
        if self.target_sparsity is not None:
            return tokens_for(self.name, prefill, self.target_sparsity)
        return tokens_to_keep(prefill.grid.length, self.retention, len(prefill.present))

    def choose(self, prefill: Prefill, hidden: Tensor, keep: int) -> Tensor:
        """Which `keep` of the visual tokens present stay: [keep] int64, ascending."""
        raise NotImplementedError


@dataclass(frozen=True)
class Random(Control):
    """Visual tokens kept at random.

    retention, target_sparsity: see Control. seed: of the draw. The clip takes part, so that each has a draw of its
    own, whatever is asked; the same on every machine, but where rounding decides which of two channels is the largest.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.seed < 0:
            raise UserError(f"method random: seed is {self.seed}; it must not be negative")

    def choose(self, prefill: Prefill, hidden: Tensor, keep: int) -> Tensor:
        x = hidden[prefill.visual].detach()
        some = x[evenly_spaced(len(x), min(len(x), DRAWN_BY)).to(x.device)]
        # which channel is the largest hardly ever hangs on rounding, which differs between processors
        content = some.float().abs().argmax(1).to(torch.int32).cpu().numpy().tobytes()
        total, seed = len(prefill.present), zlib.crc32(content, self.seed)
        prefill.note_importance(-draw(total, seed).argsort().to(hidden.device), "chance, the first drawn highest")
        return drawn(total, keep, seed)


@dataclass(frozen=True)
class Uniform(Control):
    """Every n-th visual token, in the order of the sequence. retention, target_sparsity: see Control."""

    name: ClassVar[str] = "uniform"

    def choose(self, prefill: Prefill, hidden: Tensor, keep: int) -> Tensor:
        return evenly_spaced(len(prefill.present), keep)
