"""Motion search of CMC: for every visual token, the nearest token of a reference frame by L1 distance (SAD).

Paper: CMC (ASPLOS 2024), inter-frame motion compensation as in a video codec. Pure functions on tensors.
The search is exact: bounds from block sums (successive elimination) only spare distances that cannot matter, and
the distances that are left are `torch.cdist(p=1)` in float32, the exhaustive search's own arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

INFORMATIVE = -1  # match of a token that no reference token is near enough to
ZEROED = -2  # match of a token that the padded, all-zero I-frame of a tail interval replaces
_COARSE, _FINE = 64, 8  # channels a block of the two bounds
_DENSE_SHARE = 1 / 3  # above this share of candidates left, computing all of them costs less than picking
_ROUNDOFF = 2.0**-24  # of one float32 operation
_FEW = 1 << 20  # differences of channels up to which computing all distances costs less than sparing any

# Working set of one block of tokens. On a CPU it has to stay small and near the core; on a GPU it only bounds memory.
_CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


@dataclass
class _Blocks:
    """Block sums of N rows: sums [N, ceil(D / _FINE)], norm [N] (L1), used: how many blocks are not zero at the end."""

    sums: Tensor
    norm: Tensor
    used: int


def motion_search(tokens: Tensor, reference: Tensor, limit: float) -> Tensor:
    """The nearest reference token of each token, where its L1 distance is below `limit`; the first wins a tie.

    tokens: [N, D], reference: [P, D], any floating dtype; distances are taken in float32.
    Returns [N] int64: 0 … P − 1, or INFORMATIVE.

    Extra memory: [P, D / 8] for the reference's block sums, and a working set of a few MiB. Fast where most distances
    are far above `limit` or the best one; where all are nearly equal, every one has to be computed.
    """
    reference = reference.float()
    if tokens.shape[0] * reference.numel() <= _FEW:
        return _nearest(torch.cdist(tokens.float(), reference, p=1), limit)
    blocks = _block_sums(reference)
    parts = tokens.split(_FINE * _rows_in_budget(tokens))  # the block sums of a part fit the budget
    return torch.cat([_search(part.float(), reference, blocks, limit) for part in parts])


def same_position(tokens: Tensor, reference: Tensor, limit: float) -> Tensor:
    """The simplified search: token i of each frame is compared with reference token i only. As `motion_search`.

    tokens: [N, D] with N a multiple of P, frame after frame; reference: [P, D].
    """
    position = torch.arange(len(reference), device=tokens.device).repeat(len(tokens) // len(reference))
    distance = torch.cat([_pair_distances(frame, reference) for frame in tokens.split(len(reference))])
    return torch.where(distance < limit, position, INFORMATIVE)


def frame_matches(
    tokens: Tensor, frames: int | Sequence[int], threshold: float, *, interval: int = 8, i_frame: int = 3,
    search=motion_search, zero_tail: bool = True,
) -> Tensor:  # fmt: skip
    """Motion search of whole frames: the token each visual token is replaced by.

    tokens: [S, D], frame after frame. frames: the number of tokens of each frame, one for all or one a frame.
    Frames are grouped into intervals; frame number `i_frame` of an interval is its I-frame. A token matches if its
    distance is below threshold · D.
    Returns [S] int64: the index (0 … S − 1) of the matching I-frame token, or INFORMATIVE. An I-frame's own tokens
    match themselves, or the first that is equal (newline tokens are).
    zero_tail: a tail interval too short to have a real I-frame has a padded one of zeros, as published, so its tokens
    of a norm below the limit are ZEROED; else they are all informative.
    """
    limit = threshold * tokens.shape[1]
    match = torch.full((len(tokens),), INFORMATIVE, device=tokens.device)
    sizes = [frames] * -(-len(tokens) // frames) if isinstance(frames, int) else frames
    starts = [min(start, len(tokens)) for start in accumulate(sizes, initial=0)]
    for number in range(0, len(sizes), interval):
        members = slice(starts[number], starts[min(number + interval, len(sizes))])
        if number + i_frame >= len(sizes):
            if zero_tail:
                zeros = tokens.new_zeros((1, tokens.shape[1]), dtype=torch.float32)
                near = torch.cdist(tokens[members].float(), zeros, p=1).squeeze(1) < limit
                match[members] = torch.where(near, ZEROED, INFORMATIVE)
            break
        first, last = starts[number + i_frame : number + i_frame + 2]
        found = search(tokens[members], tokens[first:last], limit)
        match[members] = torch.where(found >= 0, found + first, INFORMATIVE)
    return match


def replaced_share(match: Tensor, frames: int | Tensor, *, interval: int = 8, i_frame: int = 3) -> float:
    """CMC's sparsity: the share of the tokens that have a match, I-frames and tails without one being informative.

    match: [S]. frames: the number of tokens of every frame, or each token's frame, [S] int64.
    """
    frame = torch.arange(len(match), device=match.device) // frames if isinstance(frames, int) else frames
    return int(((match >= 0) & (frame % interval != i_frame)).sum()) / len(match)


def compensate(tokens: Tensor, match: Tensor) -> None:
    """Replace, in place, the tokens that have a match by it. tokens: [S, D], match: [S] of `frame_matches`.

    A matching token matches itself, so the order does not matter.
    """
    tokens[match == ZEROED] = 0
    own = torch.arange(len(match), device=match.device)
    replaced = torch.nonzero((match >= 0) & (match != own)).squeeze(1)
    for rows in replaced.split(_rows_in_budget(tokens)):
        tokens.index_copy_(0, rows, tokens.index_select(0, match.index_select(0, rows)))


def _search(rows: Tensor, reference: Tensor, reference_blocks: _Blocks, limit: float) -> Tensor:
    """`motion_search` of one block of float32 rows."""
    match = torch.full((len(rows),), INFORMATIVE, device=rows.device)
    blocks = _block_sums(rows)
    used = max(blocks.used, reference_blocks.used)
    alive = torch.arange(len(rows), device=rows.device)
    for size in (_COARSE, _FINE):
        bound = _lower_bounds(blocks, alive, reference_blocks, used, size, rows.shape[1])
        possible = (bound < limit).any(1)
        alive, bound = alive[possible], bound[possible]
        if len(alive) == 0:
            return match
    # zero channels at the end (a causal attention matrix has them) add nothing to a distance
    rows, reference = rows[:, : used * _FINE], reference[:, : used * _FINE]

    likely = bound.argmin(1)
    cutoff = _picked_distances(rows, reference, alive, likely).clamp(max=limit)
    left = bound <= cutoff[:, None]
    if left.sum() > _DENSE_SHARE * left.numel():
        distance = _all_distances(rows[alive], reference)
    else:
        row, candidate = torch.nonzero(left, as_tuple=True)
        distance = bound.fill_(torch.inf)
        distance[row, candidate] = _picked_distances(rows, reference, alive[row], candidate)
    match[alive] = _nearest(distance, limit)
    return match


def _nearest(distance: Tensor, limit: float) -> Tensor:
    """The first nearest of each row's distances where it is below `limit`: [N, P] → [N]."""
    least, best = distance.min(1)
    return torch.where(least < limit, best, INFORMATIVE)


def _block_sums(x: Tensor) -> _Blocks:
    """Block sums of rows [N, D] float32."""
    norm = torch.linalg.vector_norm(x, ord=1, dim=1)
    nonzero = torch.nonzero(x.any(0))
    # whole coarse blocks, so that cdist adds the channels in use in the same order as it adds all
    width = -(-(int(nonzero[-1]) + 1) // _COARSE) * _COARSE if len(nonzero) else _COARSE
    whole = x.shape[1] // _FINE * _FINE
    sums = x[:, :whole].unflatten(1, (-1, _FINE)).sum(-1)
    if whole < x.shape[1]:
        sums = torch.cat([sums, x[:, whole:].sum(1, keepdim=True)], dim=1)
    return _Blocks(sums, norm, width // _FINE)


def _lower_bounds(a: _Blocks, rows: Tensor, b: _Blocks, used: int, size: int, channels: int) -> Tensor:
    """Lower bounds, from blocks of `size` channels, of the L1 distances of a's `rows` to all of b ([N, P]).

    |Σ a − Σ b| ≤ Σ |a − b| in every block. What rounding can have added to the bound, or can take from the distance,
    is taken off, so that it holds for the distances as float32 arithmetic gives them.
    """
    step = size // _FINE
    own, other = _coarser(a.sums[:, :used], step)[rows], _coarser(b.sums[:, :used], step)
    bound = torch.cdist(own, other, p=1).mul_(1 - 2 * channels * _ROUNDOFF)
    norms = a.norm[rows, None] + b.norm
    return bound.sub_(norms, alpha=2 * _COARSE * _ROUNDOFF)


def _coarser(sums: Tensor, step: int) -> Tensor:
    """Sums of `step` neighbouring block sums each: [N, K] → [N, ceil(K / step)]."""
    if step == 1:
        return sums
    return F.pad(sums, (0, -sums.shape[1] % step)).unflatten(1, (-1, step)).sum(-1)


def _picked_distances(rows: Tensor, reference: Tensor, row: Tensor, candidate: Tensor) -> Tensor:
    """L1 distances of pairs of rows: row, candidate [K] int64 → [K]."""
    step = _rows_in_budget(rows)
    pieces = [
        _pair_distances(rows[r], reference[c]) for r, c in zip(row.split(step), candidate.split(step), strict=True)
    ]
    return torch.cat(pieces)


def _pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """[K, D], [K, D] → [K]: the arithmetic of cdist, pair by pair."""
    return torch.cdist(a.float()[:, None], b.float()[:, None], p=1).flatten()


def _all_distances(rows: Tensor, reference: Tensor) -> Tensor:
    """L1 distances of all pairs, [N, D], [P, D] → [N, P], in tiles."""
    step = _rows_in_budget(rows)
    return torch.cat([
        torch.cat([torch.cdist(a, b, p=1) for b in reference.split(step)], dim=1) for a in rows.split(step)
    ])  # fmt: skip


def _rows_in_budget(x: Tensor) -> int:
    budget = _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES["cuda"])
    return max(1, budget // (4 * max(1, x.shape[1])))
