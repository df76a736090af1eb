"""Similarity concentration (SIC): merge each vector with similar vectors of neighbouring visual tokens.

Paper: Focus (HPCA 2026), block-level and vector-level similarity concentration. Pure functions on tensors.

Shapes: T present visual tokens of D channels, that are V vectors of n channels; C candidates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.grid import VisualGrid
from focuslib.kernels.compiled import LEAST_ENTRIES, Compiled, wants_compiling

ITSELF = 0  # code of a vector that no candidate is similar enough to
ZERO = 255  # code of a vector whose entries are all zero
MAX_CANDIDATES = 254

_LANES = 16  # entries that compiled code adds in a tree, as `_sum` does
_COMPILED_SIZES = (8, 16, 32, 64, 128)  # vector sizes whose sums compiled code forms in that order
_PART = 1 << 16  # vectors moved at a time: fresh memory costs more than moving them


@dataclass
class Concentrated:
    """The outcome of one SIC call over T present visual tokens of V vectors each.

    values: [T, D], dtype of the input; members of a group replaced by the group's mean.
    codes: [T, V] uint8: ITSELF, ZERO, or k for a vector that follows its k-th candidate (1-based).
    similarity: [T, V] float32 best cosine similarity over the candidates, 0 where there is none.
    """

    values: Tensor
    codes: Tensor
    similarity: Tensor


def num_vectors(channels: int, vector_size: int) -> int:
    """How many vectors a token of `channels` channels has: ceil(channels / vector_size)."""
    return -(-channels // vector_size)


def concentrate(
    x: Tensor,
    positions: Tensor,
    grid: VisualGrid,
    *,
    threshold: float,
    vector_size: int = 32,
    frame_block: int = 2,
    block: int = 2,
    m_tile: int | None = 1024,
    max_doublings: int | None = None,
    rows: Tensor | None = None,
    overwrite: bool = False,
) -> Concentrated:
    """Concentrate similar vectors of neighbouring visual tokens.

    x: [T, D] float32, bfloat16 or float16: the visual tokens still present, in sequence order.
    positions: [T] int64, ascending: each token's place p in the original visual run (0 … S − 1).
    threshold: a vector is similar if its best cosine similarity is strictly above this; not negative.
    m_tile: tokens a GEMM tile; tokens of different tiles are never compared. None or −1: one tile.
    max_doublings: pointer-doubling steps; None: as published, the number of frames.
    rows: `candidate_rows` of the same positions, grid, blocks and m_tile, where they are used more than once.
    overwrite: write the values into x.
    """
    tokens, channels = x.shape
    vector_size = min(vector_size, channels)
    vectors = num_vectors(channels, vector_size)
    values = x
    if channels % vector_size:
        values = F.pad(x, (0, vectors * vector_size - channels))
    elif not (overwrite and x.is_contiguous()):
        values = x.clone(memory_format=torch.contiguous_format)
    split = values.view(tokens, vectors, vector_size)

    lanes = _lanes_first(split)
    inverse_norm, nonzero = _inverse_norms(lanes)
    full = bool(nonzero.all())
    if rows is None or not full:
        rows = candidate_rows(positions, grid, frame_block, block, m_tile, None if full else nonzero.any(1))
    best, codes = _best_candidates(lanes, inverse_norm, rows[1:])
    del lanes

    similar = best > threshold
    codes = codes.masked_fill_(~similar, ITSELF)
    pointer = rows.T.gather(1, codes.long())  # [T, V]
    root = resolve_pointers(pointer, grid.num_frames if max_doublings is None else max_doublings)
    _replace_by_means(split.flatten(0, 1), root, similar)
    if not full:
        codes.masked_fill_(~nonzero, ZERO)
    if values.shape[1] != channels:
        values = values[:, :channels]
    return Concentrated(x.copy_(values) if overwrite and values is not x else values, codes, best)


def candidate_rows(
    positions: Tensor,
    grid: VisualGrid,
    frame_block: int,
    block: int,
    m_tile: int | None,
    nonzero: Tensor | None = None,
) -> Tensor:
    """The row that a vector with each code points to, [C + 1, T] int64: its own, then its candidates' rows.

    −1 where a candidate is outside the run, not present or in another tile. nonzero: [T], which tokens are not entirely
    zero, if some are: they have no place in a tile. The rest: as `concentrate`.
    """
    offsets = grid.block_offsets(frame_block, block)
    if len(offsets) > MAX_CANDIDATES:
        raise ValueError(f"a block of {len(offsets)} candidates is too large; at most {MAX_CANDIDATES}")
    own = torch.arange(len(positions), device=positions.device)  # [T]
    row_of = positions.new_full((grid.length,), -1)  # [S]
    row_of[positions] = own
    source = positions - torch.tensor(offsets, dtype=torch.long, device=positions.device)[:, None]  # [C, T]
    rows = torch.where(source >= 0, row_of[source.clamp(min=0)], -1)
    if m_tile is not None and m_tile != -1:
        number = own if nonzero is None else (nonzero.cumsum(0) - 1).clamp(min=0)
        tile = number // m_tile  # [T]
        rows = torch.where(tile[rows.clamp(min=0)] == tile, rows, -1)
    return torch.cat([own[None], rows])


def resolve_pointers(pointer: Tensor, doublings: int) -> Tensor:
    """Follow pointers along dim 0 by doubling (p ← p[p]) until stable, at most `doublings` times. [T, V] int64."""
    for _ in range(doublings):
        following = pointer.gather(0, pointer)
        if torch.equal(following, pointer):
            break
        pointer = following
    return pointer


def _lanes_first(split: Tensor) -> Tensor:
    """[T, V, n] → [n, T, V]: in memory too where the arithmetic runs as it is written; compiled code needs no copy."""
    lanes = split.permute(2, 0, 1)
    return lanes if _compiles(lanes) else lanes.to(torch.float32, memory_format=torch.contiguous_format)


def _compiles(lanes: Tensor) -> bool:
    return wants_compiling(lanes) and len(lanes) in _COMPILED_SIZES


def _inverse_norms(lanes: Tensor) -> tuple[Tensor, Tensor]:
    """1/‖v‖ of every vector ([T, V] float32, 0 for zero vectors) and which vectors are not zero ([T, V] bool)."""
    squares = (_compiled_squares if _compiles(lanes) else _sums_of_squares)(lanes)
    # here and not in compiled code, whose square root rounds differently
    norm = squares.sqrt_()
    nonzero = norm > 0
    return norm.reciprocal_().masked_fill_(~nonzero, 0.0), nonzero


def _best_candidates(lanes: Tensor, inverse_norm: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine similarity over the candidates and which one has it (1-based; the first wins a tie): [T, V] each.

    lanes: [n, T, V]. inverse_norm: [T, V]. rows: [C, T].
    """
    if _compiles(lanes):
        return _compiled_matching(lanes, inverse_norm, rows[:, None])
    # all candidates at once spare small operations, one after the other they spare memory
    together = lanes.numel() < LEAST_ENTRIES and len(rows) > 0
    return _match(lanes, inverse_norm, rows[None] if together else rows[:, None])


def _sums_of_squares(lanes: Tensor) -> Tensor:
    """[n, T, V] → [T, V] float32."""
    lanes = lanes.float()
    return _sum(lanes * lanes)


def _match(lanes: Tensor, inverse_norm: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`_best_candidates` in passes of k candidates each. rows: [passes, k, T].

    A missing candidate has similarity 0, never above a threshold, so it is never chosen.
    """
    lanes = lanes.float()
    own = lanes * inverse_norm  # [n, T, V]
    best = torch.zeros_like(inverse_norm)  # [T, V]
    codes = torch.zeros_like(inverse_norm, dtype=torch.uint8)
    first = 1
    for several in rows:  # [k, T]
        source = several.clamp(min=0).flatten()  # [k·T]
        other = lanes.index_select(1, source).unflatten(1, several.shape)  # [n, k, T, V]
        other_norm = inverse_norm.index_select(0, source).unflatten(0, several.shape)  # [k, T, V]
        similarity = _sum(own[:, None] * other) * other_norm  # [k, T, V]
        similarity, choice = torch.where(several[..., None] >= 0, similarity, 0.0).max(0)  # [T, V]
        better = similarity > best
        best = torch.where(better, similarity, best)
        codes = torch.where(better, (choice + first).to(torch.uint8), codes)
        first += len(several)
    return best, codes


def _sum(lanes: Tensor) -> Tensor:
    """Sum over dim 0, adding one half to the other until one is left: one order on every machine, compiled or not."""
    least = _LANES if torch.compiler.is_compiling() else 1
    while len(lanes) > least:
        half = len(lanes) // 2
        rest = lanes[2 * half :]  # none, or the last
        lanes = lanes[:half] + lanes[half : 2 * half]
        if len(rest):
            lanes = torch.cat([lanes, rest])
    return lanes.sum(0)


_compiled_squares = Compiled(_sums_of_squares, static={0: (0,)})
_compiled_matching = Compiled(_match, static={0: (0,), 2: (0, 1)})


def _replace_by_means(vectors: Tensor, root: Tensor, similar: Tensor) -> None:
    """Replace, in place, each member of a group of two or more by the group's mean (float32 accumulation, in order).

    vectors: [T·V, n]. root, similar: [T, V]. A group is a leader and the vectors that follow it. Where doubling ended
    early, a leader can be a follower itself: then it is no member of its own group.
    """
    count = root.shape[1]
    followers = torch.nonzero(similar.flatten()).squeeze(1)  # [K] numbers of vectors
    if len(followers) == 0:
        return
    leader = root.flatten().index_select(0, followers) * count + followers % count  # [K]
    number = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device).index_fill_(0, leader, 1)  # [T·V]
    leaders = torch.nonzero(number).squeeze(1)  # [G]
    number[leaders] = torch.arange(len(leaders), device=vectors.device)
    group = number.index_select(0, leader)  # [K]

    outside = similar.flatten().index_select(0, leaders)  # [G]
    means = vectors.index_select(0, leaders).float().masked_fill_(outside[:, None], 0)  # [G, n]
    for members, groups in zip(followers.split(_PART), group.split(_PART), strict=True):
        _add_rows(means, groups, vectors.index_select(0, members).float())
    size = torch.bincount(group, minlength=len(leaders)) + ~outside
    means = means.div_(size[:, None]).to(vectors.dtype)
    vectors.index_copy_(0, leaders, means)
    for members, groups in zip(followers.split(_PART), group.split(_PART), strict=True):
        vectors.index_copy_(0, members, means.index_select(0, groups))


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """total[rows[i]] += x[i], in the order of i."""
    if total.is_cuda:  # where index_add_ adds in any order
        total.index_put_((rows,), x, accumulate=True)
    else:
        total.index_add_(0, rows, x)
