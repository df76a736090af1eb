"""AdapTiV: merge tokens with the token above or to the left where the signs of their channels agree. MICRO 2024."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import Grid
from focuslib.kernels.similarity import resolve_pointers
from focuslib.methods.base import Method
from focuslib.prefill.record import Links, Prefill, PrefillRecord

KEPT, MERGED_UP, MERGED_LEFT = 0, 1, 2  # direction of each visual token


@dataclass(frozen=True)
class Adaptiv(Method):
    """AdapTiV, with the published default.

    threshold: sign similarity (−1 … 1) from which a token is merged into its neighbour, that is dropped. This happens
    once, before the first layer's attention.

    Results: stats sparsity (dropped / S); details direction ([S] uint8: KEPT, MERGED_UP or MERGED_LEFT) and root
    ([S] int64: the token that each one ends up in).
    """

    name: ClassVar[str] = "adaptiv"

    threshold: float = 0.6

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise UserError(f"method adaptiv: threshold is {self.threshold}; a sign similarity lies in -1 … 1")

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        direction = merge_directions(hidden[prefill.visual], prefill.grid, self.threshold)
        prefill.record.stats["sparsity"] = int((direction != KEPT).sum()) / len(direction)
        prefill.record.details["direction"] = direction.cpu()
        prefill.record.details["root"] = merge_roots(direction, prefill.grid).cpu()
        return hidden, prefill.keep(direction == KEPT)

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        return record.stats["sparsity"]

    def links(self, record: PrefillRecord) -> Links:
        grid, kind = record.grid, record.details["direction"].numpy()
        target = merge_targets(record.details["direction"], grid).numpy()
        kinds = ("kept", "merged into the token above", "merged into the token to the left")
        return Links("merge direction", kinds, target.astype(np.int32), kind)


def sign_similarity(signs: Tensor, other: Tensor) -> Tensor:
    """Σ sign(a)·sign(b) / D of each token and its neighbour, 0 where there is none.

    signs: [S, D]. other: [S] int64, the neighbour's number, < 0 where there is none. → [S] float32.
    """
    agreement = (signs * signs[other.clamp(min=0)]).sum(1, dtype=torch.float32) / signs.shape[1]
    return agreement.masked_fill_(other < 0, 0)


def merge_directions(x: Tensor, grid: Grid, threshold: float) -> Tensor:
    """Which visual tokens are merged, and which way: x [S, D] → [S] uint8. Up wins a tie.

    Never merged: tokens of a frame's first row or first column, and of a video's first frame (see Grid.inner).
    """
    signs = x.sign()
    up, left = (sign_similarity(signs, other.to(x.device)) for other in grid.above_and_left())
    direction = torch.where(up >= left, MERGED_UP, MERGED_LEFT).to(torch.uint8)
    allowed = grid.inner().to(x.device)
    return torch.where(allowed & (torch.maximum(up, left) >= threshold), direction, KEPT)


def merge_targets(direction: Tensor, grid: Grid) -> Tensor:
    """The neighbour that each token is merged into, or itself: [S] uint8 → [S] int64."""
    above, left = (other.to(direction.device) for other in grid.above_and_left())
    itself = torch.arange(len(direction), device=direction.device)
    return torch.where(direction == MERGED_UP, above, torch.where(direction == MERGED_LEFT, left, itself))


def merge_roots(direction: Tensor, grid: Grid) -> Tensor:
    """The kept token that each token is merged into, directly or by way of others: [S] uint8 → [S] int64."""
    return resolve_pointers(merge_targets(direction, grid), len(direction).bit_length())
