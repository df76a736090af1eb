"""Motion search of CMC: for every visual token, the nearest token of a reference frame by L1 distance (SAD).

Paper: CMC (ASPLOS 2024), inter-frame motion compensation as in a video codec. Pure functions on tensors.
The search is exact: bounds from block sums (successive elimination), and distances added in another order where a
compiler makes them cheap, only spare distances that cannot matter. Those that are left are `torch.cdist(p=1)` in
float32, the exhaustive search's own arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.kernels.compiled import Compiled, scalar

INFORMATIVE = -1  # match of a token that no reference token is near enough to
ZEROED = -2  # match of a token that the padded, all-zero I-frame of a tail interval replaces
_COARSE, _FINE = 64, 16  # channels a block of the two bounds
_NARROW = 4 * _COARSE  # channels up to which bounds spare too little
_SMALL = 1 << 24  # differences of channels up to which all of them cost compiled code less than bounds spare
_FEW = 1 << 20  # the same of code as it is written
_TRIMMED = 1 << 22  # differences from which on it pays compiled code to look for zero channels first
_DENSE_SHARE = 1 / 3  # above this share of candidates left, computing all of them costs less than picking
_TOGETHER = 4  # rows that compiled code compares with one of the reference at a time: one sum would wait for itself
_ROUNDOFF = 2.0**-24  # of one float32 operation
_ENTRY = 16  # differences that take as long as what a compiled function does to an entry by default

# Working set of one block of tokens. On a CPU it has to stay small and near the core; on a GPU it only bounds memory.
_CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


@dataclass
class _Blocks:
    """Rows [N, D] float32 and the sums of their coarse blocks, [N, D // _COARSE].

    used: channels, whole coarse blocks, after which all rows are zero; D if the last block of D is not whole.
    norm: the largest L1 norm of a row's whole coarse blocks.
    """

    rows: Tensor
    sums: Tensor
    used: int
    norm: Tensor


def motion_search(tokens: Tensor, reference: Tensor, limit: float) -> Tensor:
    """The nearest reference token of each token, where its L1 distance is below `limit`; the first wins a tie.

    tokens: [N, D], reference: [P, D], any floating dtype; distances are taken in float32. Or those of several heads,
    each searched by itself: [H, N, D], [H, P, D].
    Returns [N] or [H, N] int64: 0 … P − 1, or INFORMATIVE.

    Extra memory: a working set of a few MiB, or of [N, P] where that is more; a copy of tokens that are not contiguous
    or not float32. Fast where most distances are far above
    `limit` or the best one; where all are nearly equal, every one has to be computed.
    """
    if tokens.dim() == 2:
        return motion_search(tokens[None], reference[None], limit)[0]
    if reference.shape[1] == 0:
        return torch.full(tokens.shape[:2], INFORMATIVE, device=tokens.device)
    differences = tokens.numel() * reference.shape[1]
    if differences > _SMALL and len(tokens) > 1:  # heads together only if all of them are small
        heads = zip(tokens.split(1), reference.split(1), strict=True)
        return torch.cat([motion_search(*head, limit) for head in heads])
    few = differences <= _FEW or tokens.shape[2] <= _NARROW
    if few or differences <= _SMALL:
        pair = tokens.float(), reference.float()
        compiled = _compiled(*pair)
        if few or compiled:
            return _exhaustive(*pair, limit, compiled)
    return torch.stack([_by_parts(*head, limit) for head in zip(tokens, reference.float(), strict=True)])


def same_position(tokens: Tensor, reference: Tensor, limit: float) -> Tensor:
    """The simplified search: token i of each frame is compared with reference token i only. As `motion_search`.

    N is a multiple of P: frame after frame.
    """
    if tokens.dim() == 3:
        return torch.stack([same_position(*head, limit) for head in zip(tokens, reference, strict=True)])
    position = torch.arange(len(reference), device=tokens.device).repeat(len(tokens) // len(reference))
    distance = torch.cat([_pair_distances(frame, reference) for frame in tokens.split(len(reference))])
    return torch.where(distance < limit, position, INFORMATIVE)


def frame_matches(
    tokens: Tensor, frames: int | Sequence[int], threshold: float, *, interval: int = 8, i_frame: int = 3,
    search=motion_search, zero_tail: bool = True,
) -> Tensor:  # fmt: skip
    """Motion search of whole frames: the token each visual token is replaced by.

    tokens: [S, D], frame after frame, or [H, S, D] of several heads. frames: the number of tokens of each frame, one
    for all or one a frame.
    Frames are grouped into intervals; frame number `i_frame` of an interval is its I-frame. A token matches if its
    distance is below threshold · D.
    Returns [S] or [H, S] int64: the index (0 … S − 1) of the matching I-frame token, or INFORMATIVE. An I-frame's own
    tokens match themselves, or the first that is equal (newline tokens are).
    zero_tail: a tail interval too short to have a real I-frame has a padded one of zeros, as published, so its tokens
    of a norm below the limit are ZEROED; else they are all informative.
    """
    length, channels = tokens.shape[-2:]
    limit = threshold * channels
    sizes = [frames] * -(-length // frames) if isinstance(frames, int) else frames
    starts = [min(start, length) for start in accumulate(sizes, initial=0)]
    matches = []
    for number in range(0, max(1, len(sizes)), interval):
        members = tokens[..., starts[number] : starts[min(number + interval, len(sizes))], :]
        if number + i_frame < len(sizes):
            first, last = starts[number + i_frame : number + i_frame + 2]
            found = search(members, tokens[..., first:last, :], limit)
            matches.append(torch.where(found < 0, found, found + first))
        elif zero_tail:
            zeros = tokens.new_zeros((1, channels), dtype=torch.float32)
            near = torch.cdist(members.float(), zeros, p=1).squeeze(-1) < limit
            matches.append(torch.where(near, ZEROED, INFORMATIVE))
        else:
            matches.append(torch.full(members.shape[:-1], INFORMATIVE, device=tokens.device))
    return torch.cat(matches, -1) if len(matches) > 1 else matches[0]


def replaced_shares(match: Tensor, frames: int | Tensor, *, interval: int = 8, i_frame: int = 3) -> list[float]:
    """CMC's sparsity: the share of the tokens that have a match, I-frames and tails without one being informative.

    match: [H, S], of several heads. frames: the number of tokens of every frame, or each token's frame, [S] int64.
    """
    length = match.shape[1]
    frame = torch.arange(length, device=match.device) // frames if isinstance(frames, int) else frames
    return [count / length for count in ((match >= 0) & (frame % interval != i_frame)).sum(1).tolist()]


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


class Compensation:
    """The same as `compensate`, in copies of sequences that hold other rows too.

    match: [S], or [H, S] of several heads. rows: [S] int64, where the tokens stand in the sequence of `length` rows.
    """

    def __init__(self, match: Tensor, rows: Tensor, length: int):
        source = torch.arange(match.numel() // len(rows) * length, device=rows.device).view(*match.shape[:-1], length)
        own = source[..., rows]
        replacement = own.gather(-1, match.clamp(min=0))
        self.zeroed = own[match == ZEROED]  # [K]
        source[..., rows] = torch.where(match >= 0, replacement, own)
        self.source = source.flatten()  # [T] or [H · T]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C], or [H, T, C] of several heads."""
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.source)
        if len(self.zeroed):
            rows.index_fill_(0, self.zeroed, 0)
        return rows.view(x.shape)


def _by_parts(tokens: Tensor, reference: Tensor, limit: float) -> Tensor:
    """`motion_search` of one head, in parts."""
    blocks = _block_sums(reference)
    parts = max(1, len(tokens) // (8 * _rows_in_budget(tokens)))
    return torch.cat([_search(part.float(), blocks, limit) for part in tokens.chunk(parts)])


def _search(rows: Tensor, reference: _Blocks, limit: float) -> Tensor:
    """`motion_search` of one block of float32 rows."""
    match = torch.full((len(rows),), INFORMATIVE, device=rows.device)
    blocks = _block_sums(rows)
    used = max(blocks.used, reference.used)
    bound = _lower_bounds(blocks, None, reference, used, _COARSE, rows.shape[1])
    alive = torch.nonzero(bound.amin(1) < limit).squeeze(1)
    if len(alive) == 0:
        return match
    bound = _lower_bounds(blocks, alive, reference, used, _FINE, rows.shape[1])
    least, likely = bound.min(1)
    possible = torch.nonzero(least < limit).squeeze(1)
    if len(possible) < len(alive):
        alive, bound, likely = alive[possible], bound[possible], likely[possible]
    if len(alive):
        # zero channels at the end (a causal attention matrix has them) add nothing to a distance
        match[alive] = _eliminated(rows[:, :used], alive, reference.rows[:, :used], bound, likely, limit)
    return match


def _eliminated(rows: Tensor, alive: Tensor, reference: Tensor, bound: Tensor, likely: Tensor, limit: float) -> Tensor:
    """`motion_search` of the rows `alive` [A] by lower bounds [A, P], of which `likely` [A] is the least: [A]."""
    distance = _picked_distances(rows, reference, alive, likely)
    left = bound <= torch.minimum(distance, scalar(limit, distance.device))[:, None]
    row, candidate = torch.nonzero(left.scatter_(1, likely[:, None], False), as_tuple=True)
    if len(row) > _DENSE_SHARE * left.numel():
        pair = rows.index_select(0, alive)[None], reference[None]
        return _exhaustive(*pair, limit, _compiled(*pair))[0]
    bound.fill_(torch.inf).scatter_(1, likely[:, None], distance[:, None])
    if len(row):
        bound[row, candidate] = _picked_distances(rows, reference, alive[row], candidate)
    return _nearest(bound, limit)


def _exhaustive(rows: Tensor, reference: Tensor, limit: float, compiled: Callable[..., Any] | None) -> Tensor:
    """`motion_search` by all distances. rows: [H, N, D], reference: [H, P, D] float32.

    compiled: what `_compiled` gives. Such code adds the channels in another order than cdist. It decides where no order
    could decide otherwise.
    """
    if compiled is None:
        return _nearest(_all_distances(rows, reference), limit)
    used = rows.shape[2]
    if rows[0].numel() * reference.shape[1] > _TRIMMED:
        used = max(2, used_columns(rows, reference))  # a causal attention matrix has others; a graph takes two
    count = rows.shape[1]
    whole = F.pad(rows, (0, 0, 0, -count % _TOGETHER)) if count % _TOGETHER else rows
    match, sure = compiled(_together(whole), reference, reference[0, 0, :used], scalar(limit, rows.device))
    match, sure = match[:, :count], sure[:, :count]
    unsure = torch.nonzero(~sure)  # [K, 2]
    for head in unsure[:, 0].unique().tolist() if len(unsure) else ():
        row = unsure[unsure[:, 0] == head, 1]
        match[head, row] = _nearest(_all_distances(rows[head].index_select(0, row), reference[head]), limit)
    return match


def _compiled(rows: Tensor, reference: Tensor) -> Callable[..., Any] | None:
    """`_decided` as it is compiled for such rows, if it is."""
    return _compiled_decided.ready(_together(rows), reference, reference[0, 0], scalar(0.0, rows.device))


def _together(rows: Tensor) -> Tensor:
    """Rows [H, N, D], as many as go into whole groups, as `_decided` takes them: a view."""
    each = rows.shape[1] // _TOGETHER
    return rows[:, : each * _TOGETHER].view(len(rows), _TOGETHER, each, rows.shape[2])


def used_columns(*x: Tensor) -> int:
    """How many columns there are up to the last that is not all zero in all of x: [..., R, C] float32 each.

    NaN is not zero. Half of a causal attention matrix is, and adds nothing to a distance.
    """
    columns = x[0].shape[-1]
    if columns == 0 or any(rows[..., -1].any() for rows in x):
        return columns
    some = [rows for rows in x if rows.numel()]
    # in a causal attention matrix the last row has the most, and what is zero bit for bit is quickly seen to be
    used = max((_end(rows[(-1,) * (rows.dim() - 1)]) for rows in some), default=0)
    rest = [rows[..., used:].view(torch.int32) for rows in some]
    if any(bits.amax() or bits.amin() for bits in rest):
        over = [tuple(range(rows.dim() - 1)) for rows in some]
        used = max(_end((rows.amax(o) != 0) | (rows.amin(o) != 0)) for rows, o in zip(some, over, strict=True))
    return used


def _end(entries: Tensor) -> int:
    """How many entries [C] there are up to the last that is not zero."""
    nonzero = torch.nonzero(entries)
    return int(nonzero[-1]) + 1 if len(nonzero) else 0


def _nearest(distance: Tensor, limit: float) -> Tensor:
    """The first nearest of each row's distances where it is below `limit`: [..., N, P] → [..., N]."""
    least, best = distance.min(-1)
    return torch.where(least < limit, best, INFORMATIVE)


def _block_sums(x: Tensor) -> _Blocks:
    """The coarse block sums of rows [N, D] float32."""
    blocks = _in_blocks(x, _COARSE)
    pairs = [_compiled_sums(part) for part in blocks.split(_rows_in_budget(x))]
    sums, absolute = pairs[0] if len(pairs) == 1 else (torch.cat(blocks) for blocks in zip(*pairs, strict=True))
    whole = absolute.shape[1] * _COARSE
    if whole < x.shape[1] and x[:, whole:].any():
        used = x.shape[1]
    else:
        # whole blocks, so that cdist adds the channels in use in the same order as it adds all
        nonzero = torch.nonzero(absolute.sum(0))
        used = _COARSE * (int(nonzero[-1]) + 1 if len(nonzero) else 1)
    return _Blocks(x, sums, used, absolute.sum(1).amax())


def _lower_bounds(a: _Blocks, rows: Tensor | None, b: _Blocks, used: int, size: int, channels: int) -> Tensor:
    """Lower bounds, from blocks of `size` channels, of the L1 distances of a's `rows` (None: all) to all of b: [N, P].

    |Σ a − Σ b| ≤ Σ |a − b| in every block. What rounding can have added to the bound, or can take from the distance,
    is taken off, so that it holds for the distances as float32 arithmetic gives them.
    """
    whole = used // _COARSE  # of which alone the norm is known
    if size == _COARSE:
        own, other = a.sums[:, :whole], b.sums[:, :whole]
    else:
        own, other = a.rows[:, : whole * _COARSE], b.rows[:, : whole * _COARSE]
    own = own if rows is None else own.index_select(0, rows)
    if size != _COARSE:
        own, other = _sums(own, size), _sums(other, size)
    bound = _compiled_distances(own, other).mul_(1 - 2 * channels * _ROUNDOFF)
    return bound.sub_(a.norm + b.norm, alpha=2 * _COARSE * _ROUNDOFF)


def _sums(x: Tensor, size: int) -> Tensor:
    """Sums of whole blocks of `size` channels: [N, D] → [N, D // size]."""
    return _in_blocks(x, size).sum(-1)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """The whole blocks of `size` channels: [N, D] → [N, D // size, size], a view."""
    return x[:, : x.shape[1] // size * size].unflatten(1, (-1, size))


def _two_sums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of blocks [N, B, size], and of their absolute values: [N, B] each."""
    return blocks.sum(-1), blocks.abs().sum(-1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """L1 distances of all pairs: [N, D], [P, D] → [N, P]. Compiled code adds the channels in an order of its own."""
    return (a[:, None] - b).abs().sum(-1) if torch.compiler.is_compiling() else torch.cdist(a, b, p=1)


def _decided(rows: Tensor, reference: Tensor, columns: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`motion_search` of rows, and where no order of addition could decide otherwise: [H, N] each.

    rows: [H, _TOGETHER, N // _TOGETHER, D], some for which one pass over the reference [H, P, D] finds the distances.
    columns: [C], as many as are in use; the others are not read. To be given those alone would take a copy.
    """
    # not a slice: the graph would have to know that its size is less
    rows, reference = (x.as_strided((*x.shape[:-1], columns.shape[0]), x.stride()) for x in (rows, reference))
    distance = torch.cat([(some[:, :, None] - reference[:, None]).abs().sum(-1) for some in rows.unbind(1)], 1)
    number = torch.arange(reference.shape[1], dtype=distance.dtype, device=rows.device)  # `min` with indices is slow
    least = distance.amin(-1)
    best = torch.where(distance == least[..., None], number, torch.inf).amin(-1)
    second = torch.where(number == best[..., None], torch.inf, distance).amin(-1)
    doubt = 4 * rows.shape[-1] * _ROUNDOFF  # twice what two orders of addition can differ by, as a share
    which = (second * (1 - doubt) > least) | (least == 0)  # zero is zero in any order
    sure = (which | (least > limit)) & ((least - limit).abs() > doubt * least)
    return torch.where(least < limit, best, float(INFORMATIVE)).long(), sure


def _work(a: Tensor, b: Tensor, *others: Tensor) -> int:
    """What all distances of rows [N, D] to [P, D], or of several heads' rows, are worth, in entries."""
    return a.numel() * b.shape[-2] // _ENTRY


_compiled_sums = Compiled(_two_sums, "N B =", work=lambda blocks: 2 * blocks.numel())
_compiled_distances = Compiled(_distances, "N D", "P D", work=_work)
_compiled_decided = Compiled(_decided, "= = N D", "= P D", "C", "", work=_work)


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
    """L1 distances of all pairs, [N, D], [P, D] → [N, P], or of several heads' rows, in tiles."""
    step = _rows_in_budget(rows)
    tiles = [[torch.cdist(a, b, p=1) for b in reference.split(step, -2)] for a in rows.split(step, -2)]
    return torch.cat([torch.cat(tile, -1) for tile in tiles], -2)


def _rows_in_budget(x: Tensor) -> int:
    budget = _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES["cuda"])
    return max(1, budget // (4 * max(1, x.shape[-1])))
