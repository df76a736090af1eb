"""Similarity concentration (SIC): merge each vector with similar vectors of neighbouring visual tokens.

Paper: Focus (HPCA 2026), block-level and vector-level similarity concentration. Pure functions on tensors.

Shapes: T present visual tokens of D channels, that are V vectors of n channels; C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
_DOUBLINGS = 7  # pointer-doubling steps in a graph, which reach over 128 pointers
_LEAST_PART = 1 << 21  # entries merged at a time: what is known of many more does not stay in the caches
_LEAST = 1e-18  # from here on the norm of a vector that holds such an entry is not 0
_PART = 1 << 16  # vectors moved at a time: fresh memory costs more than moving them


@dataclass
class Concentrated:
    """The outcome of one SIC call over T present visual tokens of V vectors each.

    values: [T, D], dtype of the input; members of a group replaced by the group's mean.
    codes: [T, V] uint8: ITSELF, ZERO, or k for a vector that follows its k-th candidate (1-based).
    similarity: [T, V] float32 best cosine similarity over the candidates, 0 where there is none.
    zero, similar: how many vectors are zero, and how many follow a candidate.
    """

    values: Tensor
    codes: Tensor
    similarity: Tensor
    zero: int
    similar: int


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
    doublings = grid.num_frames if max_doublings is None else max_doublings

    def rows_of(nonzero: Tensor | None) -> Tensor:
        if rows is None or nonzero is not None:
            return candidate_rows(positions, grid, frame_block, block, m_tile, nonzero)
        return rows

    merged = None
    if x.numel() < LEAST_ENTRIES and not x.requires_grad:
        merged = _few(values.reshape(tokens, vectors, vector_size), rows_of(None), threshold, doublings, m_tile)
    if merged is None:
        if values is x and not (overwrite and x.is_contiguous()):
            values = x.clone(memory_format=torch.contiguous_format)
        split = values.view(tokens, vectors, vector_size)
        merged = _many(split, rows_of, threshold, doublings, _parts(x, m_tile))
    values, codes, best, zero, similar = merged
    values = values.view(tokens, vectors * vector_size)[:, :channels]
    if overwrite:
        values = x if values.data_ptr() == x.data_ptr() else x.copy_(values)
    return Concentrated(values, codes, best, zero, similar)


def _few(
    split: Tensor, rows: Tensor, threshold: float, doublings: int, m_tile: int | None
) -> tuple[Tensor, Tensor, Tensor, int, int] | None:
    """All at once what `_many` does in parts, with few operations: values [T·V, n], the rest of what is concentrated.

    None where that is more than one graph does: tokens that are zero and shift the tiles, and long chains of pointers.
    """
    device = split.device
    merging = _for_size(_merging, split)
    values, codes, best, facts = merging(split, rows, scalar(threshold, device), scalar(doublings, device))
    settled, zero, similar = facts.tolist()
    tiled = m_tile is not None and m_tile != -1
    shifted = tiled and zero >= split.shape[1] and bool((codes == ZERO).all(1).any())
    return None if shifted or not settled else (values, codes, best, zero, similar)


def _many(
    split: Tensor, rows_of: Callable[[Tensor | None], Tensor], threshold: float, doublings: int, parts: list[slice]
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Merge the vectors of split [T, V, n], in place, in parts of whole tiles: what `_few` returns.

    rows_of: the candidates' rows, given which tokens are not zero, None: all.
    """
    # which vectors are similar has no gradient; what they become has
    narrow = split.detach() if split.dtype != torch.float64 else split.detach().float()
    nonzero = _nonzero_tokens(narrow)
    rows = rows_of(nonzero)
    if nonzero is not None:
        parts = [slice(0, len(split))]
    done = []
    for part in parts:
        own = rows if len(parts) == 1 else (rows[part] - part.start).clamp_(max=part.stop - part.start)
        best, codes, pointer = _best_candidates(narrow[part], own, threshold)
        root, settled = _resolve(pointer, doublings)
        _replace_by_means(split[part].view(-1, split.shape[2]), root, settled)
        done.append((codes, best))
    codes, best = done[0] if len(done) == 1 else map(torch.cat, zip(*done, strict=True))
    return split, codes, best, *count_codes(codes)


def count_codes(codes: Tensor) -> tuple[int, int]:
    """How many of some codes are ZERO, and how many neither that nor ITSELF."""
    zero, similar = _counts(codes).tolist()
    return zero, similar


def _counts(codes: Tensor) -> Tensor:
    """What `count_codes` counts, [2] int64."""
    zero = torch.count_nonzero(codes == ZERO)
    return torch.stack([zero, torch.count_nonzero(codes) - zero])  # ITSELF is 0


def _nonzero_tokens(split: Tensor) -> Tensor | None:
    """Which tokens of [T, V, n] have a vector that is not zero, [T]; None: all.

    Whole tokens are looked at only where they begin with zero.
    """
    begin = split[:, 0, 0].abs() <= _LEAST  # in float16 that is 0; NaN is not zero
    if not begin.any():
        return None
    nonzero = ~begin
    nonzero[begin] = _squares(split[begin].transpose(1, 2).float()).any(1)
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


def _best_candidates(split: Tensor, rows: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """`_match`, compiled where that is worth it. threshold: a number."""
    return _for_size(_matching, split)(split, rows, scalar(threshold, split.device))


def _for_size(compiled: Compiled, split: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """A compiled function, or as it is written where the vectors of split [T, V, n] are of another size."""
    return compiled if split.shape[2] in _COMPILED_SIZES else compiled.function


def _match(split: Tensor, rows: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each vector's best cosine similarity over its candidates and its code, [T, V] each, and what it points to.

    The first candidate wins a tie. A missing candidate counts as a zero vector: similarity 0, never above a threshold,
    so it is never chosen.
    split: [T, V, n]. rows: [T, C + 1] as `candidate_rows` gives them. threshold: [].
    Vectors point to vectors, counted row by row: [T·V] int64.
    """
    tokens, vectors, _ = split.shape
    compiling = torch.compiler.is_compiling()
    times = torch.mul if compiling else Tensor.mul_  # a graph would copy what it is told to overwrite
    lanes = split.transpose(1, 2).float()
    lanes = lanes if compiling else lanes.contiguous()  # [T, n, V]
    squares = _squares(lanes)  # [T, V]
    zero = squares == 0
    inverse = torch.where(zero, 0.0, squares.rsqrt())  # `sqrt` may go to a library that rounds in its own way
    own = lanes * inverse[:, None]  # [T, n, V]
    inverse = torch.cat([inverse, inverse.new_zeros(1, vectors)])  # [T + 1, V]: of no token, 0

    def similarity_to(several: Tensor) -> Tensor:  # [T, k] → [T, k, V]
        source = several.flatten()  # [T·k]
        other = lanes.index_select(0, source.clamp(max=tokens - 1)).unflatten(0, several.shape)  # [T, k, n, V]
        other_inverse = inverse.index_select(0, source).unflatten(0, several.shape)  # [T, k, V]
        return times(_sum(times(other, own[:, None])), other_inverse)

    # compiled, a few candidates are looked at in one pass over the vectors; as it is written, all of them at once spare
    # small operations, and one after the other they spare memory
    count = rows.shape[1] - 1
    if count == 0:
        best, codes = torch.zeros_like(squares), torch.zeros_like(squares)
    elif count <= _FEW_CANDIDATES if compiling else split.numel() >= LEAST_ENTRIES:
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
    codes = codes * (best > threshold)  # ITSELF is 0
    row = rows.gather(1, codes.long())  # [T, V]
    pointer = (row * vectors + torch.arange(vectors, device=rows.device)).flatten()
    return best, torch.where(zero, float(ZERO), codes).to(torch.uint8), pointer


def _squares(lanes: Tensor) -> Tensor:
    """The squared norms of vectors [T, n, V] float32, [T, V]; 0 also where squares are too small for float32."""
    return _sum(lanes * lanes)


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


def _merge(split: Tensor, rows: Tensor, threshold: Tensor, doublings: Tensor) -> tuple[Tensor, ...]:
    """All of SIC in one graph of one thread: values [T·V, n], codes and similarities [T, V], and facts, [3] int64.

    The facts: whether the pointers were followed as far as they are to be, how many vectors are zero, and how many
    follow a candidate.
    split, rows, threshold: as `_match`. doublings: [].
    """
    best, codes, pointer = _match(split, rows, threshold)
    if torch.compiler.is_compiling():
        for step in range(_DOUBLINGS):
            following = torch.where(step < doublings, pointer.gather(0, pointer), pointer)
            pointer = following.as_strided(pointer.shape, (1,))  # in memory, or each step would follow all before it
        settled = ((pointer.gather(0, pointer) == pointer) | (doublings <= _DOUBLINGS)).all()
    else:
        pointer = resolve_pointers(pointer, int(doublings))
        settled = torch.ones_like(doublings)
    vectors = split.reshape(-1, split.shape[2])
    total = torch.full_like(vectors, -0.0, dtype=torch.promote_types(vectors.dtype, torch.float32))  # plus x is x
    _add_rows(total, pointer, vectors)
    size = total.new_zeros(total.shape[0])
    _add_rows(size, pointer, torch.ones_like(size))
    mean = (total / size.clamp(min=1)[:, None]).index_select(0, pointer).to(split.dtype)
    return mean, codes, best, torch.cat([settled.long()[None], _counts(codes)])


_matching = Compiled(_match, "T V =", "T =", "")
_merging = Compiled(_merge, "T V =", "T =", "", "", one_thread=True)


def _replace_by_means(vectors: Tensor, root: Tensor, settled: bool) -> None:
    """Replace, in place, each member of a group of two or more by the group's mean (float32 accumulation, in order).

    vectors: [T·V, n]. root: [T·V]. A group is a leader and the vectors that follow it.
    settled: no leader follows another. Where doubling ended early one may: then it is no member of its own group.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    similar = root != torch.arange(len(root), device=root.device)
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
