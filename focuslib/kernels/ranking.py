"""Rankings of tokens that several methods share: by one row of attention, evenly spaced, and by random numbers."""

import torch
from torch import Tensor

from focuslib.kernels.semantic import attention_rows


def last_row(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """How strongly the last token that is no padding attends to each token, mean over heads.

    queries: [H, T, d], keys: [H_kv, T, d], both after rotary embedding. mask: see `semantic.attention_rows`.
    Returns [T] float32.
    """
    row = torch.tensor([queries.shape[1] - 1], device=queries.device)
    if mask is not None:
        itself = mask[0].diagonal()
        row = (itself if itself.dtype == torch.bool else itself >= 0).nonzero()[-1]
    return attention_rows(queries[:, row], keys, row, scaling, mask).mean((0, 1))


def evenly_spaced(total: int, keep: int) -> Tensor:
    """`keep` numbers of 0 … total − 1 at equal distances, each in the middle of its share: [keep] int64, ascending."""
    return ((2 * torch.arange(keep) + 1) * total).div(2 * keep, rounding_mode="floor") if keep else torch.arange(0)


def drawn(total: int, keep: int, seed: int) -> Tensor:
    """`keep` of 0 … total − 1, drawn without replacement: [keep] int64, ascending; the same for the same seed."""
    return draw(total, seed)[:keep].sort().values


def draw(total: int, seed: int) -> Tensor:
    """The numbers 0 … total − 1 in the order in which they are drawn: [total] int64; the same for the same seed."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))
