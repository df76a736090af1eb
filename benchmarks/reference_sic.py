"""The SIC kernel of November 2026 before it was compiled: blocks of rows, eager, every result in memory of its own.

Kept as the reference that benchmarks compare with: the same codes and values, bit for bit. Nothing else uses it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.grid import VisualGrid

ITSELF = 0  # code of a vector that no candidate is similar enough to
ZERO = 255  # code of a vector whose entries are all zero
MAX_CANDIDATES = 254

# Working set of one pass over a block of rows. On a CPU it has to fit a core's cache; on a GPU it bounds memory.
_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 1 << 19, 1 << 28


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
) -> Concentrated:
    """Concentrate similar vectors of neighbouring visual tokens.

    x: [T, D] float32, bfloat16 or float16: the visual tokens still present, in sequence order.
    positions: [T] int64, ascending: each token's place p in the original visual run (0 … S − 1).
    threshold: a vector is similar if its best cosine similarity is strictly above this.
    m_tile: tokens a GEMM tile; tokens of different tiles are never compared. None or −1: one tile.
    max_doublings: pointer-doubling steps; None: as published, the number of frames.

    The candidates are streamed one after another over blocks of rows, so the extra memory is that of one block.
    """
    tokens, channels = x.shape
    vector_size = min(vector_size, channels)
    vectors = num_vectors(channels, vector_size)
    if channels % vector_size:
        x = F.pad(x, (0, vectors * vector_size - channels))
    x = x.contiguous()
    offsets = grid.block_offsets(frame_block, block)
    if len(offsets) > MAX_CANDIDATES:
        raise ValueError(f"a block of {len(offsets)} candidates is too large; at most {MAX_CANDIDATES}")

    inverse_norm, nonzero = _inverse_norms(x, vectors)
    tile = _tiles(nonzero, m_tile)
    rows = _neighbour_rows(positions, offsets, grid.length, tile)
    shifts = offsets if tokens == grid.length else None
    best, codes = _best_candidates(x, vectors, inverse_norm, rows, shifts)

    similar = best > threshold
    codes = torch.where(similar, codes, ITSELF)
    pointer = _pointers(codes, rows)
    doublings = grid.num_frames if max_doublings is None else max_doublings
    root = resolve_pointers(pointer, doublings)
    values = _group_means(x.view(tokens * vectors, vector_size), root, similar)
    values = values.view(tokens, vectors * vector_size)[:, :channels]
    codes = torch.where(nonzero, codes, ZERO)
    return Concentrated(values, codes, best)


def resolve_pointers(pointer: Tensor, doublings: int) -> Tensor:
    """Follow pointers along dim 0 by doubling (p ← p[p]) until stable, at most `doublings` times. [T, V] int64."""
    for _ in range(doublings):
        following = pointer.gather(0, pointer)
        if torch.equal(following, pointer):
            break
        pointer = following
    return pointer


def _row_blocks(x: Tensor) -> list[slice]:
    """Slices of rows whose float32 working set fits the budget of x's device."""
    budget = _CPU_CHUNK_BYTES if x.device.type == "cpu" else _GPU_CHUNK_BYTES
    step = max(1, budget // (4 * max(1, x.shape[1])))
    return [slice(a, min(a + step, len(x))) for a in range(0, len(x), step)]


def _inverse_norms(x: Tensor, vectors: int) -> tuple[Tensor, Tensor]:
    """1/‖v‖ of every vector ([T, V] float32, 0 for zero vectors) and which vectors are not zero ([T, V] bool)."""
    norm = x.new_empty((len(x), vectors), dtype=torch.float32)
    for block in _row_blocks(x):
        norm[block] = torch.linalg.vector_norm(x[block].view(-1, vectors, x.shape[1] // vectors).float(), dim=-1)
    nonzero = norm > 0
    return torch.where(nonzero, norm.reciprocal(), 0.0), nonzero


def _tiles(nonzero: Tensor, m_tile: int | None) -> Tensor | None:
    """The GEMM tile of each token ([T] int64): tokens that are not entirely zero, numbered in order. None: one tile."""
    if m_tile is None or m_tile == -1:
        return None
    number = nonzero.any(dim=1).long().cumsum(0) - 1
    return number.clamp(min=0) // m_tile


def _neighbour_rows(positions: Tensor, offsets: list[int], length: int, tile: Tensor | None) -> Tensor:
    """The row of each candidate ([C, T] int64), −1 where it is outside the run, not present or in another tile."""
    row_of = positions.new_full((length,), -1)
    row_of[positions] = torch.arange(len(positions), device=positions.device)
    rows = positions.new_full((len(offsets), len(positions)), -1)
    for candidate, offset in enumerate(offsets):
        source = positions - offset
        found = torch.where(source >= 0, row_of[source.clamp(min=0)], -1)
        if tile is not None:
            found = torch.where(tile[found.clamp(min=0)] == tile, found, -1)
        rows[candidate] = found
    return rows


def _best_candidates(
    x: Tensor, vectors: int, inverse_norm: Tensor, rows: Tensor, shifts: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Best cosine similarity over the candidates and which candidate has it (1-based; the first wins a tie).

    shifts: each candidate's distance in rows if it is the same for all rows (no token dropped), which saves gathering.
    A missing candidate is a zero vector: similarity 0, never above a threshold, so it is never chosen here.
    """
    best = torch.zeros_like(inverse_norm)
    codes = torch.zeros_like(inverse_norm, dtype=torch.uint8)
    present = rows >= 0
    rows = rows.clamp(min=0)
    for block in _row_blocks(x):
        own = x[block].view(-1, vectors, x.shape[1] // vectors).float()
        own = own * inverse_norm[block, :, None]
        best_here, codes_here = best[block], codes[block]
        for candidate, row in enumerate(rows[:, block]):
            shift = shifts[candidate] if shifts else block.stop
            source = slice(block.start - shift, block.stop - shift) if shift <= block.start else row
            similarity = (own * x[source].view_as(own).float()).sum(-1) * inverse_norm[source]
            better = (similarity > best_here) & present[candidate, block, None]
            best_here.copy_(torch.where(better, similarity, best_here))
            codes_here.masked_fill_(better, candidate + 1)
    return best, codes


def _pointers(codes: Tensor, rows: Tensor) -> Tensor:
    """The row each vector points to ([T, V] int64): its candidate's row, or its own."""
    own = torch.arange(codes.shape[0], device=codes.device)
    table = torch.cat([own[None], rows])
    return table.T.gather(1, codes.long())


def _group_means(flat: Tensor, root: Tensor, similar: Tensor) -> Tensor:
    """Replace each member of a group of two or more vectors by the group's mean (float32 accumulation).

    flat: [T·V, vector_size]; root, similar: [T, V].
    """
    tokens, vectors = root.shape
    key = root * vectors + torch.arange(vectors, device=root.device)
    followers = key[similar]
    if len(followers) == 0:
        return flat.clone()
    members_of = torch.zeros(tokens * vectors, dtype=torch.bool, device=flat.device)
    members_of[followers] = True
    # every vector whose pointer ends at a followed vector: the followers and the roots themselves
    member = torch.nonzero(members_of[key.view(-1)]).squeeze(1)
    keys, order = torch.sort(key.view(-1)[member], stable=True)
    member = member[order]
    _, group, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    means = F.embedding_bag(member, flat.float(), starts, mode="mean").to(flat.dtype)
    values = flat.clone()
    values[member] = means[group]
    return values


def at_site(x: Tensor, positions: Tensor, grid: VisualGrid, **options) -> Tensor:
    """What the method did at a site whose tokens are all visual: concentrate, copy, write the values into the copy."""
    merged = concentrate(x, positions, grid, **options)
    x = x.clone()
    x[:] = merged.values
    return x
