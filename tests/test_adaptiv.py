"""AdapTiV against vectors of the published implementation and an oracle written token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.methods import Adaptiv
from focuslib.methods.adaptiv import KEPT, MERGED_LEFT, MERGED_UP, merge_directions, merge_roots
from focuslib.methods.base import Prefill
from focuslib.prefill.ops import DecoderShape

SHAPE = DecoderShape(layers=4, hidden=64, mlp=128, heads=4, kv_heads=2, head_dim=16)


def rows_of(frames, height, width, start=4, between=0):
    """A grid of frames of height × width tokens, `between` further tokens after each."""
    size = height * width + between
    return VisualGrid(start, frames * size, frames, height, width, size, width)


@pytest.mark.parametrize("case", ["video", "image"])
def test_equals_published_vectors(golden, case):
    data, meta = golden(f"adaptiv_{case}")
    hidden = torch.from_numpy(data["input"])
    run = Prefill(rows_of(meta["frames"], meta["height"], meta["width"]), SHAPE, len(hidden), hidden.device, False)
    method = Adaptiv(meta["threshold"])
    method.begin(run, hidden)
    hidden, rows = method.before_attention(run, 0, hidden)
    run.drop(0, rows)
    assert run.kept.tolist() == data["kept"].tolist()
    assert torch.equal(hidden[rows], torch.from_numpy(data["output"]))
    assert run.record.details["root"].tolist() == data["merged"].tolist()
    assert run.record.stats["sparsity"] == pytest.approx(float(data["sparsity"]))
    assert method.table_two_sparsity(run.record) == run.record.stats["sparsity"]
    assert method.before_attention(run, 1, hidden[rows])[1] is None


@pytest.mark.parametrize("frames", [5, 6])
def test_equals_published_vectors_of_uncut_frames(golden, frames):
    """MiniCPM-V's frames of 67 tokens under its frame stride of 199: the first 199 tokens are exempt."""
    data, meta = golden(f"adaptiv_frames67_{frames}")
    sides = (meta[name] for name in ("height", "width", "frame_stride", "height_stride", "width_stride"))
    grid = VisualGrid(meta["image_start"], meta["image_len"], meta["frames"], *sides)
    hidden = torch.from_numpy(data["input"])
    run = Prefill(grid, SHAPE, len(hidden), hidden.device, False)
    hidden, rows = Adaptiv(meta["threshold"]).before_attention(run, 0, hidden)
    run.drop(0, rows)
    assert run.kept.tolist() == data["kept"].tolist()
    assert torch.equal(hidden[rows], torch.from_numpy(data["output"]))
    assert run.record.details["root"].tolist() == data["merged"].tolist()
    assert run.record.stats["sparsity"] == pytest.approx(float(data["sparsity"]))


def oracle(x, grid, frame, threshold):
    """Direction of each token, one token at a time."""
    signs = [[(value > 0) - (value < 0) for value in token] for token in x.tolist()]
    directions = []
    for p in range(len(signs)):
        row, column = divmod(p % frame, grid.height_stride)
        if row == 0 or column == 0 or (p < frame and len(signs) >= 2 * frame):
            directions.append(KEPT)
            continue
        up, left = (
            sum(a * b for a, b in zip(signs[p], signs[p - distance], strict=True)) / len(signs[p])
            for distance in (grid.height_stride, grid.width_stride)
        )
        merged = max(up, left) >= threshold
        directions.append((MERGED_UP if up >= left else MERGED_LEFT) if merged else KEPT)
    return directions


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    between=st.integers(0, 7),
    power=st.integers(0, 4),
    steps=st.integers(-8, 8),
)
def test_equals_oracle(seed, frames, height, width, between, power, steps):
    """Channel counts are powers of two and thresholds eighths, so that every similarity is exact and ties occur."""
    grid = rows_of(frames, height, width, between=between)
    x = torch.randint(-1, 3, (grid.length, 2**power), generator=torch.Generator().manual_seed(seed)).float()
    direction = merge_directions(x, grid, steps / 8)
    assert direction.tolist() == oracle(x, grid, grid.frame_stride, steps / 8)
    roots = merge_roots(direction, grid)
    for p, root in enumerate(roots.tolist()):
        while direction[p] != KEPT:
            p -= grid.height_stride if direction[p] == MERGED_UP else grid.width_stride
        assert p == root


def test_rows_of_an_image_in_tiles():
    """LLaVA's image grid: base patches, then a map with newlines; the published rows are the map's throughout."""
    grid = VisualGrid(14, 9 + 4 * 6, 5, height=4, width=6, frame_stride=3, height_stride=6)
    direction = merge_directions(torch.ones(grid.length, 8), grid, 0.5)
    merged = [p for p, way in enumerate(direction.tolist()) if way != KEPT]
    assert merged == [p for p in range(33) if (p % 24) // 6 > 0 and p % 6 > 0]


def test_up_wins_a_tie_and_zeros_agree_with_nothing():
    grid = rows_of(1, 2, 2)
    assert merge_directions(torch.ones(4, 8), grid, 1.0).tolist() == [KEPT, KEPT, KEPT, MERGED_UP]
    assert merge_directions(torch.zeros(4, 8), grid, 0.1).tolist() == [KEPT] * 4
    left = torch.tensor([[1.0], [-1.0], [1.0], [1.0]])
    assert merge_directions(left, grid, 0.5).tolist() == [KEPT, KEPT, KEPT, MERGED_LEFT]


@pytest.mark.parametrize("threshold", [1.01, -2, math.nan])
def test_bad_threshold(threshold):
    with pytest.raises(UserError, match=r"adaptiv: threshold is .*; a sign similarity lies in"):
        Adaptiv(threshold)
