"""Similarity concentration (SIC): merge each vector with similar vectors of neighbouring visual tokens.

Paper: Focus (HPCA 2026), block-level and vector-level similarity concentration. Pure functions on tensors.

Shapes: T present visual tokens of D channels, that are V vectors of n channels; C candidates.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.grid import Grid
from focuslib.kernels.compiled import LEAST_ENTRIES, Compiled, scalar

ITSELF = 0  # code of a vector that no candidate is similar enough to
ZERO = 255  # code of a vector whose entries are all zero
MAX_CANDIDATES = 254

_LANES = 16  # entries that compiled code adds in a tree, as `_sum` does
_COMPILED_SIZES = (8, 16, 32, 64, 128)  # vector sizes whose sums compiled code forms in that order
_FEW_CANDIDATES = 16  # up to which compiled code looks at each apart, 1.7 to 2.6 times as fast; it grows with them
_FEW_ENTRIES = 1 << 17  # up to which the number of operations costs more than moving the entries
_LEAST_PART = 1 << 21  # entries merged at a time: what is known of many more does not stay in the caches
_LEAST = 1e-18  # from here on the norm of a vector that holds such an entry is not 0
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
    grid: Grid,
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

    x: [T, D] float64, float32, bfloat16 or float16: the visual tokens still present, in sequence order.
    positions: [T] int64, ascending: each token's number p among the original visual tokens (0 … S − 1).
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
    # which vectors are similar has no gradient; what they become has
    narrow = split.detach() if split.dtype != torch.float64 else split.detach().float()
    parts = _parts(x, m_tile)
    norms = _norms(narrow) if len(parts) == 1 else None
    nonzero = _nonzero_tokens(narrow, norms)
    if nonzero is not None:
        parts = [slice(0, tokens)]
    if rows is None or nonzero is not None:
        rows = candidate_rows(positions, grid, frame_block, block, m_tile, nonzero)
    doublings = grid.num_frames if max_doublings is None else max_doublings
    done = []
    for part in parts:
        own = rows if len(parts) == 1 else (rows[part] - part.start).clamp_(max=part.stop - part.start)
        inverse_norm = _norms(narrow[part]) if norms is None else norms  # [T + 1, V]
        norm = inverse_norm[:-1]
        zero: Any = None if norm.all() else norm == 0
        norm.reciprocal_()
        if zero is not None:
            norm.masked_fill_(zero, 0.0)
        best, codes, pointer = _best_candidates(narrow[part], inverse_norm, own, threshold)
        root, settled = _resolve(pointer, doublings)
        _replace_by_means(split[part].view(-1, vector_size), root, codes, settled)
        done.append((best, codes if zero is None else codes.masked_fill_(zero, ZERO)))
    best, codes = done[0] if len(done) == 1 else map(torch.cat, zip(*done, strict=True))
    if values.shape[1] != channels:
        values = values[:, :channels]
    return Concentrated(x.copy_(values) if overwrite and values is not x else values, codes, best)


def _norms(split: Tensor) -> Tensor:
    """The norm of each vector of [T, V, n], and a row of zeros: [T + 1, V] float32.

    That of entries whose squares are too small for float32 is 0.
    """
    norms = split.new_zeros((split.shape[0] + 1, split.shape[1]), dtype=torch.float32)
    torch.linalg.vector_norm(split, dim=-1, dtype=torch.float32, out=norms[:-1])
    return norms


def _nonzero_tokens(split: Tensor, norms: Tensor | None = None) -> Tensor | None:
    """Which tokens have a vector that is not zero, [T]; None: all.

    norms: as `_norms` gives them, if they are known; else whole tokens are looked at only where they begin with zero.
    """
    if norms is None:
        begin = split[:, 0, 0].abs() <= _LEAST  # in float16 that is 0; NaN is not zero
        if not begin.any():
            return None
        nonzero = ~begin
        nonzero[begin] = _norms(split[begin])[:-1].any(1)
    else:
        nonzero = norms[:-1].any(1)
    return None if nonzero.all() else nonzero


def _parts(x: Tensor, m_tile: int | None) -> list[slice]:
    """The rows of x [T, D] in parts of whole tiles, none of which has to do with another; on a CPU small ones."""
    tokens, channels = x.shape
    if x.is_cuda or m_tile is None or m_tile == -1:
        return [slice(0, tokens)]
    step = m_tile * -(-_LEAST_PART // (m_tile * channels))
    return [slice(first, min(first + step, tokens)) for first in range(0, max(1, tokens), step)]


def candidate_rows(
    positions: Tensor,
    grid: Grid,
    frame_block: int,
    block: int,
    m_tile: int | None,
    nonzero: Tensor | None = None,
) -> Tensor:
    """The row that a vector with each code points to, [T, C + 1] int64: its own, then its candidates' rows.

    T where a candidate does not exist, is not present or in another tile. nonzero: [T], which tokens are not entirely
    zero, if some are: they have no place in a tile. The rest: as `concentrate`.
    """
    candidates = len(grid.block_places(frame_block, block))
    if candidates > MAX_CANDIDATES:
        raise ValueError(f"a block of {candidates} candidates is too large; at most {MAX_CANDIDATES}")
    own = torch.arange(len(positions), device=positions.device)  # [T]
    missing = len(positions)
    row_of = positions.new_full((grid.length + 1,), missing)  # [S + 1]
    row_of[positions] = own
    rows = row_of[grid.candidates(positions, frame_block, block).clamp_(min=-1)]  # [C, T]
    if m_tile is not None and m_tile != -1:
        number = own if nonzero is None else (nonzero.cumsum(0) - 1).clamp(min=0)
        tile = F.pad(number // m_tile, (0, 1), value=-1)  # [T + 1]
        rows = torch.where(tile[rows] == tile[:-1], rows, missing)
    return torch.cat([own[None], rows]).T.contiguous()


def resolve_pointers(pointer: Tensor, doublings: int) -> Tensor:
    """Follow pointers along dim 0 by doubling (p ← p[p]) until stable, at most `doublings` times. [T, V] int64."""
    return _resolve(pointer, doublings)[0]


def _resolve(pointer: Tensor, doublings: int) -> tuple[Tensor, bool]:
    """As `resolve_pointers`, and whether the pointers are known to be stable."""
    for _ in range(doublings):
        following = pointer.gather(0, pointer)
        if torch.equal(following, pointer):
            return pointer, True
        pointer = following
    return pointer, False


def _best_candidates(split: Tensor, inverse_norm: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """Each vector's best cosine similarity over its candidates and its code, [T, V] each, and what it points to.

    The first candidate wins a tie. split: [T, V, n] contiguous. inverse_norm: [T + 1, V], 0 for zero vectors; the last
    row is of no token, and 0.
    rows: [T, C + 1] as `candidate_rows` gives them. Vectors point to vectors, counted row by row: [T·V] int64.
    """
    if rows.shape[1] == 1:
        none = torch.zeros_like(inverse_norm[:-1])
        return none, none.to(torch.uint8), torch.arange(none.numel(), device=none.device)
    matching = _matching if split.shape[2] in _COMPILED_SIZES else _match
    return matching(split, inverse_norm, rows, scalar(threshold, inverse_norm.device))


def _match(split: Tensor, inverse_norm: Tensor, rows: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_best_candidates`, threshold: [].

    A missing candidate counts as a zero vector: similarity 0, never above a threshold, so it is never chosen.
    """
    tokens, vectors, _ = split.shape
    compiling = torch.compiler.is_compiling()
    times = torch.mul if compiling else Tensor.mul_  # a graph would copy what it is told to overwrite
    lanes = split.transpose(1, 2).float()
    lanes = lanes if compiling else lanes.contiguous()  # [T, n, V]
    own = lanes * inverse_norm.index_select(0, rows[:, 0])[:, None]  # [T, n, V]

    def similarity_to(several: Tensor) -> Tensor:  # [T, k] → [T, k, V]
        source = several.flatten()  # [T·k]
        other = lanes.index_select(0, source.clamp(max=tokens - 1)).unflatten(0, several.shape)  # [T, k, n, V]
        other_norm = inverse_norm.index_select(0, source).unflatten(0, several.shape)  # [T, k, V]
        return times(_sum(times(other, own[:, None])), other_norm)

    # compiled, a few candidates are looked at in one pass over the vectors; as it is written, all of them at once spare
    # small operations, and one after the other they spare memory
    count = rows.shape[1] - 1
    if count <= _FEW_CANDIDATES if compiling else split.numel() >= LEAST_ENTRIES:
        best = similarity_to(rows[:, 1:2]).squeeze(1)  # [T, V]
        codes = torch.ones_like(best)
        for number in range(2, count + 1):
            similarity = similarity_to(rows[:, number : number + 1]).squeeze(1)
            better = (similarity > best) | (similarity != similarity)  # as the maximum, it is NaN if one is
            best = torch.where(better, similarity, best)
            codes = torch.where(better, float(number), codes)
    else:
        best, choice = similarity_to(rows[:, 1:]).max(1)  # [T, V]
        codes = choice + 1
    best = best.clamp(min=0)
    codes = (codes * (best > threshold)).to(torch.uint8)  # ITSELF is 0
    row = rows.gather(1, codes.long())  # [T, V]
    return best, codes, (row * vectors + torch.arange(vectors, device=rows.device)).flatten()


def _sum(lanes: Tensor) -> Tensor:
    """Sum over dim −2, adding one half to the other until one is left: one order everywhere, compiled or not.

    Uncompiled, it overwrites its argument.
    """
    compiling = torch.compiler.is_compiling()
    count = lanes.shape[-2]
    while count > (_LANES if compiling else 1):
        half = count // 2
        rest = lanes[..., 2 * half :, :] if count % 2 else None  # the last
        one, other = lanes[..., : 2 * half, :].chunk(2, -2)
        lanes = one + other if compiling else one.add_(other)
        if rest is not None:
            lanes = torch.cat([lanes, rest], -2)
        count = half + count % 2
    return lanes.sum(-2) if compiling else lanes.squeeze(-2)


_matching = Compiled(_match, "T V =", "P V", "T =", "")


def _replace_by_means(vectors: Tensor, root: Tensor, codes: Tensor, settled: bool) -> None:
    """Replace, in place, each member of a group of two or more by the group's mean (float32 accumulation, in order).

    vectors: [T·V, n]. root: [T·V], codes: [T, V]. A group is a leader and the vectors that follow it.
    settled: no leader follows another. Where doubling ended early one may: then it is no member of its own group.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    if vectors.numel() < _FEW_ENTRIES:  # fewer operations, more traffic; the sums are added in the same order
        total = torch.full_like(vectors, -0.0, dtype=wide)  # plus x is x, also if that is -0
        _add_rows(total, root, vectors.clone() if vectors.requires_grad else vectors)  # autograd keeps what is added
        size = torch.bincount(root, minlength=len(root)).clamp_(min=1)
        vectors.copy_(total.div_(size[:, None]).index_select(0, root))
        return
    similar = codes.flatten() != ITSELF
    followers = similar.nonzero().squeeze(1)  # [K] numbers of vectors
    if followers.shape[0] == 0:
        return
    leaders = root.index_select(0, followers)  # [K]
    total = vectors if settled and vectors.dtype == wide else vectors.to(wide, copy=True)
    if not settled:
        total.index_fill_(0, followers, -0.0)
    pieces = list(_pieces(followers, leaders))
    for members, into in pieces:
        _add_rows(total, into, vectors.index_select(0, members))
    size = torch.bincount(leaders, minlength=total.shape[0]) + ~similar  # [T·V]
    # a follower that leads no one has no size, and no use of what it becomes here; a gradient would be 0 / 0
    total.div_(size.clamp_(min=1)[:, None])
    if total is not vectors:
        vectors.copy_(total)
    for members, source in pieces:
        vectors.index_copy_(0, members, total.index_select(0, source).to(vectors.dtype))


def _pieces(*indices: Tensor):
    """Parts of equally long indices: moving many vectors at once costs more in fresh memory than in moving."""
    for start in range(0, indices[0].shape[0], _PART):
        yield tuple(index[start : start + _PART] for index in indices)


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """total[rows[i]] += x[i], in the order of i."""
    if total.is_cuda:  # where index_add_ adds in any order
        total.index_put_((rows,), x.to(total.dtype), accumulate=True)
    else:
        total.index_add_(0, rows, x.to(total.dtype))
