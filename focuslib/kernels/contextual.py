"""VisionZip: the tokens the tower attends to stay, the others are merged into a few evenly spaced ones. CVPR 2025."""

import torch
from torch import Tensor

from focuslib.kernels.semantic import most_important


def contextual_targets(rest: int, contextual: int) -> Tensor:
    """Which of the `rest` tokens others are merged into: [≤ contextual] int64, at a uniform stride."""
    return torch.arange(0, rest, max(1, rest // max(1, contextual)))[:contextual]


def dominant_and_contextual(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Which tokens of one picture stay, and which each of the others joins.

    score: [N], how strongly the tower attends to each token. keys: [N, d] of the tower, mean over heads.
    Returns kept ([k] int64: the dominant ones in order, then the contextual ones) and joins ([N] int64: the token each
    one is merged into, itself for those kept).
    """
    best = most_important(score, dominant)
    rest = torch.ones(len(score), dtype=torch.bool, device=score.device)
    rest[best] = False
    rest = rest.nonzero().squeeze(1)
    targets = rest[contextual_targets(len(rest), contextual).to(rest.device)]
    joins = torch.arange(len(score), device=score.device)
    others = rest[~torch.isin(rest, targets)]
    if len(others) and len(targets):
        keys = keys.float() / keys.float().norm(dim=-1, keepdim=True)
        joins[others] = targets[(keys[others] @ keys[targets].T).argmax(1)]
    return torch.cat([best, targets]), joins


def add_means(x: Tensor, joins: Tensor) -> Tensor:
    """Every token plus the mean of those that join it (published: not their common mean). x [N, D] → [N, D]."""
    others = (joins != torch.arange(len(joins), device=joins.device)).nonzero().squeeze(1)
    total = torch.zeros(x.shape, device=x.device).index_add_(0, joins[others], x[others].float())
    count = torch.bincount(joins[others], minlength=len(x)).clamp(min=1)
    return (x.float() + total / count[:, None]).to(x.dtype)
