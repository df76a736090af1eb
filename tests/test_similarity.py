"""SIC against vectors of the published implementation, a float64 oracle and properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import ITSELF, ZERO, concentrate
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import Trace

CASES = ["block111_f2", "block333", "pad", "plain", "pruned_tile", "query_heads", "thin_grid", "tile", "vector_gt_dim"]


@pytest.mark.parametrize("case", CASES)
def test_equals_published_vectors(golden, case):
    data, meta = golden(f"sic_{case}")
    height, width = meta["height"], meta["width"]
    grid = VisualGrid(
        start=meta["image_start"],
        length=meta["image_len"],
        num_frames=meta["frames"],
        height=height,
        width=width,
        frame_stride=meta["frame_stride"],
        height_stride=meta["height_stride"],
        width_stride=meta["width_stride"],
    )
    x, expected = torch.from_numpy(data["input"]), torch.from_numpy(data["output"])
    if x.ndim == 3:  # heads, tokens, head_dim
        x, expected = (part.transpose(0, 1).flatten(1) for part in (x, expected))
    retained = torch.from_numpy(data.get("retained", np.arange(len(x))))
    visual = (retained >= grid.start) & (retained < grid.stop)
    positions = retained[visual] - grid.start
    merged = concentrate(
        x[visual],
        positions,
        grid,
        threshold=meta["threshold"],
        vector_size=meta["vector_size"],
        frame_block=meta["frame_block"],
        block=meta["block"],
        m_tile=meta["m_tile"],
    )
    codes = torch.full(data["mask_zero"].shape, ZERO, dtype=torch.uint8)
    codes[0, positions] = merged.codes
    trace = Trace(grid, {site: codes for site in SITES}, meta["frame_block"], meta["block"])
    assert torch.equal(trace.mask_zero("query"), torch.from_numpy(data["mask_zero"]))
    assert torch.equal(trace.mask_similar("query"), torch.from_numpy(data["mask_similar"]))
    assert torch.equal(trace.group_index("query", 0), torch.from_numpy(data["group_idx"][0]))
    sparsity = (trace.mask_zero("query") | trace.mask_similar("query")).double().mean().item()
    assert sparsity == pytest.approx(float(data["sparsity"]), abs=1e-12)
    torch.testing.assert_close(merged.values, expected[visual], rtol=0, atol=1e-5)


def oracle(x, positions, grid, threshold, vector_size, frame_block, block, m_tile):
    """The semantics token by token, in float64, on the zero-filled full sequence. Margin: the closest decision."""
    channels = x.shape[1]
    vectors = -(-channels // vector_size)
    full = np.zeros((grid.length, vectors * vector_size))
    full[positions, :channels] = x
    full = full.reshape(grid.length, vectors, vector_size)
    number, tile = 0, {}
    for p in range(grid.length):
        if full[p].any():
            tile[p] = number // m_tile if m_tile else 0
            number += 1
    pointer = np.tile(np.arange(grid.length)[:, None], (1, vectors))
    margin = np.inf
    for p in range(grid.length):
        for v in range(vectors):
            similarities = [0.0]
            for offset in grid.block_offsets(frame_block, block):
                q = p - offset
                if q < 0 or p not in tile or tile.get(q) != tile[p]:
                    continue
                norms = np.linalg.norm(full[p, v]) * np.linalg.norm(full[q, v])
                similarity = full[p, v] @ full[q, v] / norms if norms else 0.0
                if similarity > max(similarities) and similarity > threshold:
                    pointer[p, v] = q
                similarities.append(similarity)
            best = sorted(similarities)[::-1]
            margin = min(margin, abs(best[0] - threshold))
            if len(best) > 1 and best[0] > threshold:
                margin = min(margin, best[0] - best[1])
    for _ in range(grid.num_frames):
        pointer = np.take_along_axis(pointer, pointer, 0)
    values = full.copy()
    for v in range(vectors):
        for root in np.unique(pointer[:, v]):
            members = pointer[:, v] == root
            values[members, v] = full[members, v].mean(0)
    return values.reshape(grid.length, -1)[positions, :channels], pointer, margin


@st.composite
def problems(draw):
    frames, height, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
    grid = VisualGrid(draw(st.integers(0, 3)), frames * height * width, frames, height, width, height * width, width)
    vector_size = draw(st.sampled_from([3, 4, 8]))
    channels = draw(st.integers(vector_size, 3 * vector_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = rng.normal(size=(1, height * width, channels)) + 0.6 * rng.normal(size=(1, 1, channels))
    x = (base + 0.4 * rng.normal(size=(frames, height * width, channels))).reshape(-1, channels)
    positions = np.flatnonzero(rng.random(grid.length) < draw(st.sampled_from([0.3, 0.7, 1.0])))
    x = x[positions]
    if len(x) and draw(st.booleans()):
        x[rng.integers(len(x))] = 0
    return (
        grid,
        x.astype(np.float32),
        positions,
        vector_size,
        {
            "threshold": draw(st.sampled_from([0.0, 0.5, 0.8, 0.95])),
            "frame_block": draw(st.integers(1, 3)),
            "block": draw(st.integers(1, 3)),
            "m_tile": draw(st.sampled_from([None, 5, 16])),
        },
    )


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_float64_oracle(problem):
    grid, x, positions, vector_size, options = problem
    if len(x) == 0:
        return
    values, pointer, margin = oracle(x, positions, grid, vector_size=vector_size, **options)
    if margin < 1e-5:
        return  # float32 may decide the other way
    merged = concentrate(torch.from_numpy(x), torch.from_numpy(positions), grid, vector_size=vector_size, **options)
    torch.testing.assert_close(merged.values, torch.from_numpy(values).float(), rtol=1e-5, atol=1e-5)
    codes = torch.full((1, grid.length, merged.codes.shape[1]), ZERO, dtype=torch.uint8)
    codes[0, positions] = merged.codes
    trace = Trace(grid, {"query": codes}, options["frame_block"], options["block"])
    flat = pointer * pointer.shape[1] + np.arange(pointer.shape[1])
    assert (trace.group_index("query", 0).numpy() == flat).all()


def video_like(frames=8, side=7, channels=128, seed=0):
    grid = VisualGrid(0, frames * side * side, frames, side, side, side * side, side)
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, side * side, channels, generator=generator)
    x = (still + 0.35 * torch.randn(frames, side * side, channels, generator=generator)).flatten(0, 1)
    return x, torch.arange(grid.length), grid


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_float32(dtype):
    x, positions, grid = video_like(frames=16, side=10)
    half = concentrate(x.to(dtype), positions, grid, threshold=0.85)
    exact = concentrate(x, positions, grid, threshold=0.85)
    assert half.values.dtype == dtype
    similar = [(r.codes != ITSELF) & (r.codes != ZERO) for r in (half, exact)]
    assert 0.2 < similar[1].float().mean() < 0.95
    # rounding the inputs to half precision moves decisions near the threshold; against float32 arithmetic on the
    # same rounded inputs the masks must agree
    same = concentrate(x.to(dtype).float(), positions, grid, threshold=0.85)
    assert (half.codes == same.codes).float().mean() >= 0.999
    assert (similar[0] == similar[1]).float().mean() >= 0.99


def test_nothing_is_similar_above_one():
    x, positions, grid = video_like()
    merged = concentrate(x, positions, grid, threshold=1.5)
    assert torch.equal(merged.values, x)
    assert (merged.codes == ITSELF).all()


def test_one_tile_equals_a_tile_longer_than_the_sequence():
    x, positions, grid = video_like()
    one, long = (concentrate(x, positions, grid, threshold=0.85, m_tile=tile) for tile in (-1, grid.length + 1))
    assert torch.equal(one.codes, long.codes) and torch.equal(one.values, long.values)


def test_the_chunk_size_does_not_matter(monkeypatch):
    x, positions, grid = video_like()
    whole = concentrate(x, positions, grid, threshold=0.85)
    monkeypatch.setattr("focuslib.kernels.similarity._CPU_CHUNK_BYTES", 4 * 128 * 3)
    pieces = concentrate(x, positions, grid, threshold=0.85)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.values, pieces.values)


def test_no_tokens_left():
    _, _, grid = video_like()
    merged = concentrate(torch.zeros(0, 64), torch.zeros(0, dtype=torch.long), grid, threshold=0.9)
    assert merged.values.shape == (0, 64)
