"""Motion search of CMC: for every visual token, the nearest token of a reference frame by L1 distance (SAD).

Paper: CMC (ASPLOS 2024), inter-frame motion compensation as in a video codec. Pure functions on tensors.
The search is exact: bounds from block sums (successive elimination), and distances added in another order where a
compiler makes them cheap, only spare distances that cannot matter. Those that are left are `torch.cdist(p=1)` in
float32, the exhaustive search's own arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from focuslib.kernels.compiled import Compiled

INFORMATIVE = -1  # match of a token that no reference token is near enough to
ZEROED = -2  # match of a token that the padded, all-zero I-frame of a tail interval replaces
_COARSE, _FINE = 64, 16  # channels a block of the two bounds
_NARROW = 4 * _COARSE  # channels up to which bounds spare too little
_DENSE_SHARE = 1 / 3  # above this share of candidates left, computing all of them costs less than picking
_ROUNDOFF = 2.0**-24  # of one float32 operation
_FEW = 1 << 20  # differences of channels up to which computing all distances costs less than sparing any
_ENTRY = 16  # differences that take as long as what a compiled function does to an entry by default

# Working set of one block of tokens. On a CPU it has to stay small and near the core; on a GPU it only bounds memory.
_CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


@dataclass
class _Blocks:
    """Rows [N, D] float32 and their sums over coarse blocks [N, ceil(D / _COARSE)]; norm [N] (L1).

    used: how many coarse blocks are not zero in all rows at the end, at least one.
    """

    rows: Tensor
    sums: Tensor
    norm: Tensor
    used: int


def motion_search(tokens: Tensor, reference: Tensor, limit: float) -> Tensor:
    """The nearest reference token of each token, where its L1 distance is below `limit`; the first wins a tie.

    tokens: [N, D], reference: [P, D], any floating dtype; distances are taken in float32.
    Returns [N] int64: 0 … P − 1, or INFORMATIVE.

    Extra memory: a working set of a few MiB, or of [N, P] where that is more. Fast where most distances are far above
    `limit` or the best one; where all are nearly equal, every one has to be computed.
    """
    reference = reference.float()
    differences = tokens.shape[0] * reference.numel()
    if differences <= _FEW:
        return _nearest(torch.cdist(tokens.float(), reference, p=1), limit)
    if tokens.shape[1] <= _NARROW:
        return _exhaustive(tokens.float(), reference, limit)
    blocks = _block_sums(reference)
    parts = max(1, len(tokens) // (8 * _rows_in_budget(tokens)))  # of more rows than that, a few operations each
    return torch.cat([_search(part.float(), blocks, limit) for part in tokens.chunk(parts)])


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
    zeroed = torch.nonzero(match == ZEROED).squeeze(1)
    if len(zeroed):
        tokens.index_fill_(0, zeroed, 0)
    own = torch.arange(len(match), device=match.device)
    replaced = torch.nonzero((match >= 0) & (match != own)).squeeze(1)
    for rows in replaced.split(_rows_in_budget(tokens)):
        tokens.index_copy_(0, rows, tokens.index_select(0, match.index_select(0, rows)))


def _search(rows: Tensor, reference: _Blocks, limit: float) -> Tensor:
    """`motion_search` of one block of float32 rows."""
    match = torch.full((len(rows),), INFORMATIVE, device=rows.device)
    blocks = _block_sums(rows)
    used = max(blocks.used, reference.used)
    alive, bound = None, None
    for size in (_COARSE, _FINE):
        bound = _lower_bounds(blocks, alive, reference, used, size, rows.shape[1])
        possible = torch.nonzero((bound < limit).any(1)).squeeze(1)
        if len(possible) == 0:
            return match
        if len(possible) < len(bound):
            alive, bound = possible if alive is None else alive[possible], bound[possible]
    # zero channels at the end (a causal attention matrix has them) add nothing to a distance
    rows, other = rows[:, : used * _COARSE], reference.rows[:, : used * _COARSE]
    alive = torch.arange(len(rows), device=rows.device) if alive is None else alive

    likely = bound.argmin(1)
    distance = _picked_distances(rows, other, alive, likely)
    left = bound <= distance.clamp(max=limit)[:, None]
    if left.sum() > _DENSE_SHARE * left.numel():
        match[alive] = _exhaustive(rows[alive], other, limit)
        return match
    bound.fill_(torch.inf).scatter_(1, likely[:, None], distance[:, None])
    row, candidate = torch.nonzero(left.scatter_(1, likely[:, None], False), as_tuple=True)
    if len(row):
        bound[row, candidate] = _picked_distances(rows, other, alive[row], candidate)
    match[alive] = _nearest(bound, limit)
    return match


def _exhaustive(rows: Tensor, reference: Tensor, limit: float) -> Tensor:
    """`motion_search` by all distances. rows, reference: float32.

    Compiled code adds the channels in another order than cdist. It decides where no order could decide otherwise.
    """
    if not _compiled_nearest.wanted(rows, reference):
        return _nearest(_all_distances(rows, reference), limit)
    least, best, second = _compiled_nearest(rows, reference)
    doubt = 4 * rows.shape[1] * _ROUNDOFF  # twice what two orders of addition can differ by, as a share
    match = torch.where(least < limit, best, INFORMATIVE)
    sure = (second * (1 - doubt) > least) & ((least - limit).abs() > doubt * least)
    unsure = torch.nonzero(~sure).squeeze(1)
    if len(unsure):
        match[unsure] = _nearest(_all_distances(rows.index_select(0, unsure), reference), limit)
    return match


def _nearest(distance: Tensor, limit: float) -> Tensor:
    """The first nearest of each row's distances where it is below `limit`: [N, P] → [N]."""
    least, best = distance.min(1)
    return torch.where(least < limit, best, INFORMATIVE)


def _block_sums(x: Tensor) -> _Blocks:
    """The coarse block sums of rows [N, D] float32."""
    parts = [x] if _compiled_sums.wanted(x) else x.split(_rows_in_budget(x))
    sums, absolute = (torch.cat(blocks) for blocks in zip(*map(_compiled_sums, parts), strict=True))
    nonzero = torch.nonzero(absolute.sum(0))
    return _Blocks(x, sums, absolute.sum(1), int(nonzero[-1]) + 1 if len(nonzero) else 1)


def _lower_bounds(a: _Blocks, rows: Tensor | None, b: _Blocks, used: int, size: int, channels: int) -> Tensor:
    """Lower bounds, from blocks of `size` channels, of the L1 distances of a's `rows` (None: all) to all of b: [N, P].

    |Σ a − Σ b| ≤ Σ |a − b| in every block. What rounding can have added to the bound, or can take from the distance,
    is taken off, so that it holds for the distances as float32 arithmetic gives them.
    """
    own, other, norm = a.sums[:, :used], b.sums[:, :used], a.norm
    if size != _COARSE:
        own, other = a.rows[:, : used * _COARSE], b.rows[:, : used * _COARSE]
    if rows is not None:
        own, norm = own.index_select(0, rows), norm.index_select(0, rows)
    if size != _COARSE:
        own, other = _sums(own, size), _sums(other, size)
    bound = _compiled_distances(own, other).mul_(1 - 2 * channels * _ROUNDOFF)
    return bound.sub_(norm[:, None] + b.norm, alpha=2 * _COARSE * _ROUNDOFF)


def _sums(x: Tensor, size: int) -> Tensor:
    """Sums of blocks of `size` channels, the last block being what is left: [N, D] → [N, ceil(D / size)]."""
    whole = x.shape[1] // size * size
    sums = x[:, :whole].unflatten(1, (-1, size)).sum(-1)
    return sums if whole == x.shape[1] else torch.cat([sums, x[:, whole:].sum(1, keepdim=True)], dim=1)


def _coarse_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse block sums of rows [N, D], and of their absolute values: [N, ceil(D / _COARSE)] each."""
    return _sums(x, _COARSE), _sums(x.abs(), _COARSE)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """L1 distances of all pairs: [N, D], [P, D] → [N, P]. Compiled code adds the channels in an order of its own."""
    return (a[:, None] - b).abs().sum(-1) if torch.compiler.is_compiling() else torch.cdist(a, b, p=1)


def _two_nearest(rows: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least L1 distance of each row, which reference row has it, and the least of the others: [N] each."""
    distance = _distances(rows, reference)
    least, best = distance.min(1)
    own = torch.arange(reference.shape[0], device=rows.device) == best[:, None]
    return least, best, distance.masked_fill(own, torch.inf).amin(1)


def _work(a: Tensor, b: Tensor) -> int:
    """What all distances of rows [N, D] to [P, D] are worth, in entries."""
    return a.shape[0] * b.numel() // _ENTRY


_compiled_sums = Compiled(_coarse_sums)
_compiled_distances = Compiled(_distances, size=_work)
_compiled_nearest = Compiled(_two_nearest, size=_work)


def _picked_distances(rows: Tensor, reference: Tensor, row: Tensor, candidate: Tensor) -> Tensor:
    """L1 distances of pairs of rows: row, candidate [K] int64 → [K]."""
    step = _rows_in_budget(rows)
    pieces = [
        _pair_distances(rows.index_select(0, r), reference.index_select(0, c))
        for r, c in zip(row.split(step), candidate.split(step), strict=True)
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
