"""FlashVID: segments of alike frames, diverse tokens, trees through time, and clusters within frames. ICLR 2026."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_lengths(means: Tensor, threshold: float, least: int) -> list[int]:
    """Cut between frames whose means are less alike than `threshold`, and at the least alike until `least` segments.

    means: [F, D], the mean token of each frame. Returns the numbers of frames of the segments, in order.
    """
    frames = len(means)
    means = means / means.norm(dim=-1, keepdim=True)
    similarity = (means[:-1] * means[1:]).sum(-1)
    cuts = set((similarity < threshold).nonzero().squeeze(1).tolist())
    for place in similarity.sort(stable=True).indices.tolist():
        if len(cuts) + 1 >= min(least, frames):
            break
        cuts.add(place)
    ends = [*(cut + 1 for cut in sorted(cuts)), frames]
    return [end - first for first, end in zip([0, *ends], ends, strict=False)]


def diverse_order(frames: Tensor, attention: Tensor, keep: int) -> Tensor:
    """Greedily each frame's token farthest from those before it: cosine distance times the attention that it receives.

    frames: [F, T, D]. attention: [F, T]. Returns [F, keep] int64: the first k of a row are the k diverse tokens.
    """
    normed = frames.float() / frames.float().norm(dim=-1, keepdim=True)
    similarity = torch.stack([frame @ frame.T for frame in normed])
    distance = (1 - similarity) * (attention.float() * 1e6)[:, None]  # the factor as published: no underflow
    number = torch.arange(len(frames), device=frames.device)
    # the first is farthest from its neighbour: the second in order, for each token's least distance is to itself
    nearest = distance.topk(min(2, frames.shape[1]), dim=1, largest=False).values[:, -1]
    chosen = frames.new_empty((len(frames), keep), dtype=torch.int64)
    for step in range(keep):
        chosen[:, step] = nearest.argmax(1)
        row = distance[number, chosen[:, step]]
        nearest = row if step == 0 else torch.minimum(nearest, row)
        nearest.scatter_(1, chosen[:, : step + 1], -1)
    return chosen


def best_matches(frames: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Each free token's most similar free token of the frame before: cosine [F, T] (−1 where none) and place [F, T].

    frames: [F, T, D]. free: [F, T] bool, the tokens that may be merged.
    """
    normed = frames / frames.norm(dim=-1, keepdim=True)
    similarity = normed[1:] @ normed[:-1].transpose(1, 2)  # [F − 1, T, T]
    similarity = similarity.masked_fill(~free[1:, :, None], -1).masked_fill(~free[:-1, None, :], -1)
    best, place = similarity.max(-1)
    return F.pad(best, (0, 0, 1, 0), value=-1), F.pad(place, (0, 0, 1, 0), value=-1)


def merge_trees(frames: Tensor, free: Tensor, threshold: float, quota: int) -> tuple[Tensor, Tensor]:
    """Chain tokens to their best match in the frame before, and gather each tree in its earliest token.

    Published: a sum over the whole tree, divided by one more than the tokens that joined the earliest one directly; of
    trees deeper than two frames that is more than the mean.

    frames: [F, T, D] of one segment. free: [F, T] bool. threshold: cosine above which a token is chained; raised where
    fewer than `quota` tokens would be left. Returns the frames with the means ([F, T, D]) and which free tokens are
    left ([F, T] bool).
    """
    best, place = best_matches(frames, free)
    chained = best > threshold
    if int((~chained).sum()) < quota:
        allowed = best.numel() - quota
        lowest = best.flatten().sort(descending=True).values[max(allowed, 1) - 1]
        chained = best > max(float(lowest), -1 + 1e-6)
    total, count = frames.float().clone(), torch.ones(frames.shape[:2], device=frames.device)
    for frame in range(len(frames) - 1, 0, -1):
        moved = chained[frame]
        total[frame - 1].index_add_(0, place[frame, moved], total[frame, moved])
        count[frame - 1].index_add_(0, place[frame, moved], torch.ones(int(moved.sum()), device=frames.device))
    return (total / count[..., None]).to(frames.dtype), free & ~chained


def density_peaks(x: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering: dense tokens far from denser ones are the centers.

    x: [N, D]. neighbours: k of the density. Of equal densities the first counts as the higher (published: random noise
    of 1e-6 decides). Returns label [N] and centers [clusters], int64.
    """
    distance = torch.cdist(x.float(), x.float()) / math.sqrt(x.shape[1])
    nearest = distance.sort(1).values[:, :neighbours]
    density = (-(nearest**2).mean(1)).exp()
    order = density.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(x), device=x.device))
    denser = rank[None] < rank[:, None]
    separation = torch.where(denser, distance, distance.max()).min(1).values
    centers = (separation * density).sort(descending=True, stable=True).indices[:clusters]
    label = distance[:, centers].argmin(1)
    label[centers] = torch.arange(clusters, device=x.device)
    return label, centers


def cluster_means(x: Tensor, label: Tensor, clusters: int) -> Tensor:
    """The mean of each cluster: x [N, D], label [N] → [clusters, D]."""
    total = torch.zeros((clusters, x.shape[1]), device=x.device).index_add_(0, label, x.float())
    return (total / torch.bincount(label, minlength=clusters)[:, None]).to(x.dtype)


def compress_segment(
    frames: Tensor, attention: Tensor, diverse: int, merged: int, threshold: float, *, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One segment: the diverse tokens of each frame as they are, the others as trees, those as clusters if too many.

    frames: [F, T, D]. attention: [F, T] that each token receives in the tower. diverse, merged: tokens a frame.
    order: of `diverse_order`, where it is known.
    Returns the tokens [k, D] and their numbers in the segment [k] int64, ascending.
    """
    count, size, width = frames.shape
    number = torch.arange(count * size, device=frames.device).view(count, size)
    order = diverse_order(frames, attention, diverse) if order is None else order
    chosen = order[:, :diverse].sort(1).values
    tokens = [x[index] for x, index in zip(frames, chosen, strict=True)]
    numbers = [row[index] for row, index in zip(number, chosen, strict=True)]
    if merged:
        free = torch.ones((count, size), dtype=torch.bool, device=frames.device).scatter_(1, chosen, False)
        if count > 1:
            means, left = merge_trees(frames, free, threshold, (diverse + merged) * count)
        else:
            means, left = frames, torch.ones_like(free)  # as published: a single frame's diverse tokens count again
        ratio = merged * count / max(1, int(left.sum()))
        for x, stays, row in zip(means, left, number, strict=True):
            kept, where = x[stays], row[stays]
            clusters = math.ceil(len(kept) * ratio)
            if clusters and ratio < 1:
                label, centers = density_peaks(kept, clusters, min(clusters, 7))
                kept, where = cluster_means(kept, label, clusters), where[centers]
            tokens.append(kept)
            numbers.append(where)
    ascending = torch.cat(numbers).sort(stable=True)
    return torch.cat(tokens).view(-1, width)[ascending.indices], ascending.values
