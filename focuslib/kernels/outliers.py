"""VidCom2: keep what differs most from the mean of its frame and of the video. EMNLP 2025."""

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.kernels.semantic import most_important

WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussians
TEMPERATURE = 0.01


def low_variance_channels(x: Tensor) -> Tensor:
    """The half of the channels with the lowest variance over all tokens: [S, D] → [S, D // 2]."""
    order = x.var(0, unbiased=False).sort(stable=True).indices
    return x[:, order[: x.shape[1] // 2]]


def gaussian_similarity(x: Tensor, center: Tensor) -> Tensor:
    """Σ exp(−‖x − c‖² / 2w) over WIDTHS: x [S, D], center [1 or S, D] → [S]."""
    distance = ((x - center) ** 2).sum(-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in WIDTHS]).sum(0)


def mean_similarities(x: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """How like the video's mean, and how like its frame's mean, each token is.

    x: [S, D]. frame: [S] int64, each token's frame, from 0. Returns [S] and [S] float32.
    """
    x = F.normalize(low_variance_channels(x.float()), dim=-1)
    total = x.new_zeros(int(frame.max()) + 1, x.shape[1]).index_add_(0, frame, x)
    means = total / torch.bincount(frame)[:, None]
    return gaussian_similarity(x, x.mean(0, keepdim=True)), gaussian_similarity(x, means[frame])


def frame_shares(video: Tensor, frame: Tensor, retention: float) -> Tensor:
    """The share of its tokens that each frame keeps, more where it is less like the video's mean: [S] → [F]."""
    total = video.new_zeros(int(frame.max()) + 1).index_add_(0, frame, video)
    uniqueness = -total / torch.bincount(frame)
    weight = torch.softmax((uniqueness - uniqueness.max()) / TEMPERATURE, 0)
    return (retention * (1 + weight - weight.mean())).clamp(max=1)


def frame_counts(shares: Tensor, sizes: list[int]) -> list[int]:
    """Tokens that each frame keeps, at least one: shares [F], sizes: tokens of each frame."""
    return (shares * torch.tensor(sizes, device=shares.device)).round().long().clamp(min=1).tolist()


def outliers(score: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
    """Of each frame the `counts` tokens of the lowest score: [S] → [k] int64, ascending."""
    first, kept = 0, []
    for size, count in zip(sizes, counts, strict=True):
        kept.append(first + most_important(-score[first : first + size], count))
        first += size
    return torch.cat(kept)
