"""SIC against vectors of the published implementation, a float64 oracle and properties."""

import fcntl
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import needs_compiler

from focuslib.grid import VisualGrid
from focuslib.kernels import compiled, similarity
from focuslib.kernels.compiled import at_once, uncompiled
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


def test_no_tokens_left():
    _, _, grid = video_like()
    merged = concentrate(torch.zeros(0, 64), torch.zeros(0, dtype=torch.long), grid, threshold=0.9)
    assert merged.values.shape == (0, 64)


@pytest.fixture
def compiled_always():
    """Compile whatever the size, and say nothing: what cannot be compiled is an error."""
    with warnings.catch_warnings(), at_once():
        warnings.filterwarnings("error", "torch cannot compile")
        yield


def random_problem(seed):
    """Tokens, positions, grid and options of any shape that is compiled: a few candidates, a few vector sizes."""
    rng = np.random.default_rng(seed)
    frames, height, width = rng.integers(2, 9), rng.integers(2, 9), rng.integers(2, 9)
    grid = VisualGrid(0, int(frames * height * width), *map(int, (frames, height, width, height * width, width)))
    vector_size = int(rng.choice([16, 32]))
    channels = int(rng.integers(2 * vector_size, 9 * vector_size))
    still = rng.normal(size=(1, height * width, channels)) + 0.5 * rng.normal(size=channels)
    x = (still + 0.3 * rng.normal(size=(frames, height * width, channels))).reshape(-1, channels)
    positions = np.flatnonzero(rng.random(grid.length) < rng.choice([0.3, 0.7, 1.0]))
    x = torch.from_numpy(x[positions]).to([torch.float32, torch.bfloat16][seed % 2])
    if seed % 5 == 0:
        x[len(x) // 2 :: 7] = 0  # whole tokens
    if seed % 5 == 1:
        x[::3, :vector_size] = x[1::7, vector_size : 2 * vector_size] = 0  # vectors
    options = {
        "threshold": float(rng.choice([0.5, 0.8, 0.9])),
        "m_tile": int(rng.choice([-1, 16, 100])),
        "max_doublings": int(rng.integers(1, 9)),
    }
    return x, torch.from_numpy(positions), grid, {"vector_size": vector_size, **options}


@needs_compiler
@pytest.mark.parametrize("least", [compiled.LEAST_ENTRIES, 1])  # in one graph, and in parts
def test_compiled_equals_uncompiled_bit_for_bit(compiled_always, monkeypatch, least):
    monkeypatch.setattr(similarity, "LEAST_ENTRIES", least)
    problems = [random_problem(seed) for seed in range(100)]
    with torch.inference_mode():
        compiled = [concentrate(x, positions, grid, **options) for x, positions, grid, options in problems]
        with uncompiled():
            plain = [concentrate(x, positions, grid, **options) for x, positions, grid, options in problems]
        for (x, positions, grid, options), a, b in zip(problems, compiled, plain, strict=True):
            assert torch.equal(a.codes, b.codes) and torch.equal(a.similarity, b.similarity)
            assert torch.equal(a.values, b.values)
            overwritten = concentrate(x, positions, grid, **options, overwrite=True)
            assert torch.equal(x, a.values) and overwritten.values is x
    assert any((a.codes != ITSELF).float().mean() > 0.3 for a in compiled)


@needs_compiler
@pytest.mark.parametrize("side", [2, 3])  # few candidates, looked at one by one, and many
def test_candidates_apart_and_at_once_and_compiled_give_the_same(side, monkeypatch):
    """Also where similarities are equal, or NaN, or infinite."""
    grid = VisualGrid(0, 180, 5, 6, 6, 36, 6)
    x = torch.randn(180, 64, generator=torch.Generator().manual_seed(0))
    x[40:80] = x[:40]
    x[100, 3], x[120, 40], x[140, 20] = torch.nan, torch.inf, -torch.inf
    split = x.view(180, 4, 16)
    rows = similarity.candidate_rows(torch.arange(180), grid, side, side, -1)
    with uncompiled(), torch.inference_mode():
        at_once_ = similarity._best_candidates(split, rows, 0.3)
        monkeypatch.setattr(similarity, "LEAST_ENTRIES", 1)
        apart = similarity._best_candidates(split, rows, 0.3)
    with at_once(), torch.inference_mode():
        compiled_ = similarity._best_candidates(split, rows, 0.3)
    assert at_once_[0].isnan().any() and (at_once_[1] > 0).any()
    for found in (apart, compiled_):
        for one, other in zip(found, at_once_, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(40))
def test_whole_tiles_on_their_own_give_what_all_rows_at_once_give(seed, monkeypatch):
    """Also the gradients, and with rows that were looked up before."""
    x, positions, grid, options = random_problem(seed)
    options["m_tile"] = [1, 7, 16, 100][seed % 4]
    looked_up = similarity.candidate_rows(positions, grid, 2, 2, options["m_tile"]) if x.any(1).all() else None
    found = []
    for least in (1 << 40, 1):
        monkeypatch.setattr(similarity, "_LEAST_PART", least)
        parts = similarity._parts(x, options["m_tile"])
        assert len(parts) == (1 if least > 1 else -(-len(x) // options["m_tile"]))
        y = x.clone().requires_grad_()
        merged = concentrate(y, positions, grid, **options, rows=looked_up)
        weight = torch.arange(x.shape[1], dtype=x.dtype)
        (merged.values * weight).sum().backward()
        found.append((merged.values.detach(), merged.codes, merged.similarity, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_zeros_are_found_as_by_all_norms(dtype):
    """Also where squares are too small for float32, so that a norm is 0."""
    entries = torch.tensor([0.0, 0.0, 1e-30, -1e-23, 1e-19, 1e-18, -1e-17, 6e-8, 1.0, torch.nan])
    picked = torch.randint(0, len(entries), (2000, 2, 2), generator=torch.Generator().manual_seed(0))
    split = entries.to(dtype)[picked].float() if dtype == torch.float64 else entries.to(dtype)[picked]
    nonzero = similarity._squares(split.transpose(1, 2).float()).any(1)
    assert 0 < nonzero.sum() < len(split)
    assert torch.equal(similarity._nonzero_tokens(split), nonzero)
    assert similarity._nonzero_tokens(split[nonzero]) is None


@needs_compiler
def test_token_counts_are_not_compiled_one_by_one(compiled_always, monkeypatch):
    x, positions, grid = video_like(frames=16, side=6, channels=96)
    graphs = {}
    monkeypatch.setattr(similarity._merging, "_graphs", graphs)
    with torch.inference_mode():
        for count in range(40, 520, 16):  # 30 token counts, two widths
            for width in (96, 64):
                concentrate(x[:count, :width], positions[:count], grid, threshold=0.85)
    assert len(graphs) == 1 and all(graph.run for graph in graphs.values())


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads(compiled_always):
    x, positions, grid = video_like(frames=16, side=10)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(concentrate(x, positions, grid, threshold=0.85))
    finally:
        torch.set_num_threads(threads)
    one, two = found
    assert torch.equal(one.codes, two.codes) and torch.equal(one.values, two.values)


@needs_compiler
def test_later_processes_read_what_one_compiled(compiled_always, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    x, positions, grid = video_like(frames=4, side=4, channels=96)

    def concentrate_anew():
        monkeypatch.setattr(similarity._merging, "_graphs", {})  # what a process has in memory
        return concentrate(x, positions, grid, threshold=0.85)

    first = concentrate_anew()
    (file,) = tmp_path.glob("*.so")
    written = file.stat().st_mtime_ns
    second = concentrate_anew()
    assert file.stat().st_mtime_ns == written and torch.equal(first.values, second.values)


def test_what_cannot_be_compiled_or_loaded_is_said_once(monkeypatch, tmp_path):
    x, positions, grid = video_like(frames=4, side=4, channels=96)
    expected, tries = concentrate(x, positions, grid, threshold=0.85), []
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "_broken", False)
    monkeypatch.setattr(similarity._merging, "_graphs", {})
    monkeypatch.setattr(similarity._merging, "_write", lambda file, arguments: tries.append(file.write_bytes(b"?")))
    with at_once(), pytest.warns(UserWarning, match="cannot compile here .*cannot be loaded") as said:
        found = [concentrate(x, positions, grid, threshold=0.85) for _ in range(3)]
    assert len(tries) == len(said) == 1
    assert all(torch.equal(one.values, expected.values) for one in found)


def test_thresholds_beyond_float32():
    x, positions, grid = video_like(frames=4, side=4, channels=96)
    for threshold in (1e39, float("inf")):
        assert (concentrate(x, positions, grid, threshold=threshold).codes == ITSELF).all()


def test_small_calls_are_compiled_once_they_have_cost_enough(monkeypatch, tmp_path):
    x, positions, grid = video_like(frames=4, side=4, channels=96)
    calls, compilations = [], []
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "PATIENCE", 3 * x.numel())
    monkeypatch.setattr(similarity._merging, "_graphs", {})
    monkeypatch.setattr(similarity._merging, "_write", lambda file, arguments: compilations.append(len(calls)))

    def concentrate_again():
        calls.append(concentrate(x, positions, grid, threshold=0.85))

    for _ in range(3):
        concentrate_again()
    (graph,) = similarity._merging._graphs.values()
    with graph.file.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process that compiles it
        concentrate_again()
    assert compilations == []
    monkeypatch.setattr(compiled, "_broken", False)  # back to what it is after this test
    with pytest.warns(UserWarning, match="cannot be loaded"):
        concentrate_again()
    assert compilations == [4]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_small_and_large_inputs_take_ways_that_give_the_same_bits(seed):
    x, positions, grid, options = random_problem(seed)
    x[x.abs() < 0.1] = -0.0
    small = concentrate(x, positions, grid, **options)
    with pytest.MonkeyPatch.context() as patch, uncompiled():
        patch.setattr(similarity, "LEAST_ENTRIES", 0)
        large = concentrate(x, positions, grid, **options)
    for a, b in ((small.values, large.values), (small.codes, large.codes), (small.similarity, large.similarity)):
        assert torch.equal(a, b)
    assert torch.equal(small.values.signbit(), large.values.signbit())


WITHOUT_COMPILER = """
import sys
import warnings

import torch

from focuslib.grid import VisualGrid
from focuslib.kernels import compiled, similarity
from focuslib.kernels.similarity import concentrate

x = torch.randn(600, 2048, generator=torch.Generator().manual_seed(0)).cumsum(0)
assert x.numel() >= compiled.LEAST_ENTRIES
grid = VisualGrid(0, 600, 6, 10, 10, 100, 10)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    one, two = (concentrate(x, torch.arange(600), grid, threshold=0.9) for _ in range(2))
assert torch.equal(one.values, two.values) and (one.codes > 0).any()
said = [str(warning.message) for warning in said if "torch cannot compile here" in str(warning.message)]
assert len(said) == 1 and "no-such-compiler" in said[0], said
similarity.LEAST_ENTRIES = x.numel() + 1
small = concentrate(x, torch.arange(600), grid, threshold=0.9)  # all candidates at once
assert torch.equal(one.codes, small.codes) and torch.equal(one.values, small.values)
"""


def test_without_a_compiler_one_warning_and_the_same_result(tmp_path):
    caches = {name: str(tmp_path) for name in ("FOCUS_CACHE", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, **caches, "CXX": "/no-such-compiler"}
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, check=True)


def test_pointers_that_stop_short_of_the_root():
    """With one doubling, a vector may end at one that follows another: it is no member of the group it leads."""
    x = torch.ones(6, 4) * torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None]
    grid = VisualGrid(0, 6, 1, 1, 6, 6, 6)
    merged = concentrate(x, torch.arange(6), grid, threshold=0.9, vector_size=4, max_doublings=1)
    assert merged.values[:, 0].tolist() == [2.0, 2.0, 2.0, 4.0, 5.0, 6.0]
