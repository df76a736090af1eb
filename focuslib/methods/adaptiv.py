"""AdapTiV: merge tokens with the token above or to the left where the signs of their channels agree. MICRO 2024."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
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
        keep = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        keep[prefill.visual] = direction == KEPT
        return hidden, torch.nonzero(keep).squeeze(1)

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        return record.stats["sparsity"]

    def links(self, record: PrefillRecord) -> Links:
        grid, kind = record.grid, record.details["direction"].numpy()
        target = np.arange(grid.length) - np.array([0, grid.height_stride, grid.width_stride])[kind]
        kinds = ("kept", "merged into the token above", "merged into the token to the left")
        return Links("merge direction", kinds, target.astype(np.int32), kind)


def sign_similarity(x: Tensor, distance: int) -> Tensor:
    """Σ sign(a)·sign(b) / D of each token and the one `distance` before it, 0 where there is none: [S, D] → [S]."""
    signs = x.sign()
    agreement = (signs[distance:] * signs[:-distance]).sum(1, dtype=torch.float32) / x.shape[1]
    return torch.cat([agreement.new_zeros(min(distance, len(x))), agreement])


def merge_directions(x: Tensor, grid: VisualGrid, threshold: float) -> Tensor:
    """Which visual tokens are merged, and which way: x [S, D] → [S] uint8. Up wins a tie.

    Never merged: tokens of a frame's first row or first column and, if the media has more frames than one, the first
    `frame_stride` tokens (published: also where that is more than a frame, as with MiniCPM-V's uncut frames).
    """
    up, left = sign_similarity(x, grid.height_stride), sign_similarity(x, grid.width_stride)
    direction = torch.where(up >= left, MERGED_UP, MERGED_LEFT).to(torch.uint8)
    position = torch.arange(len(x), device=x.device)
    within = position % grid.frame_size
    allowed = (within >= grid.height_stride) & (within % grid.height_stride >= grid.width_stride)
    if not grid.one_picture:
        allowed &= position >= grid.frame_stride
    return torch.where(allowed & (torch.maximum(up, left) >= threshold), direction, KEPT)


def merge_roots(direction: Tensor, grid: VisualGrid) -> Tensor:
    """The kept token that each token is merged into, directly or by way of others: [S] uint8 → [S] int64."""
    distances = torch.tensor([0, grid.height_stride, grid.width_stride], device=direction.device)
    pointer = torch.arange(len(direction), device=direction.device) - distances[direction.long()]
    return resolve_pointers(pointer, len(pointer).bit_length())
