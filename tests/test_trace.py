"""The native trace: lossless, small, bounded in memory, safe against broken files; and the simulator's file."""

import json
import resource
import struct
import subprocess
import sys
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import ITSELF, ZERO, concentrate, resolve_pointers
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import MAGIC, Trace, TraceWriter


@st.composite
def traces(draw):
    """A trace of random tokens, as the kernels make it: grids, blocks, tiles, pruning, vector sizes."""
    frames, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    newline = draw(st.integers(0, 1))
    columns = width + newline
    grid = VisualGrid(3, frames * height * columns, frames, height, width, height * columns, columns)
    frame_block, block, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    tile = draw(st.sampled_from([-1, 2, 5, 1000]))
    layers, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    codes, present = {site: [] for site in SITES}, torch.arange(grid.length)
    for _ in range(layers):
        for site in SITES:
            x = torch.randint(-1, 2, (len(present), 8 if site == "down_proj" else 6), generator=generator).float()
            found = concentrate(
                x, present, grid, threshold=0.5, vector_size=size, frame_block=frame_block, block=block, m_tile=tile
            ).codes
            full = torch.full((grid.length, found.shape[1]), ZERO, dtype=torch.uint8)
            full[present] = found
            codes[site].append(full)
        kept = torch.rand(len(present), generator=generator) < 0.7
        present = present[kept] if kept.any() else present
    return Trace(grid, {site: torch.stack(parts) for site, parts in codes.items()}, frame_block, block, None)


def reference(trace: Trace) -> dict:
    """The simulator's layout, written down plainly: candidate k of token p is k-th in the block's order."""
    grid = trace.grid
    sides = (min(trace.frame_block, grid.num_frames), min(trace.block, grid.height), min(trace.block, grid.width))
    offsets = [f * grid.frame_stride + h * grid.height_stride + w for f, h, w in product(*map(range, sides))]
    out = {"mask_zero": {}, "mask_similar": {}, "group_idx": {}}
    for site in SITES:
        codes = torch.stack(list(trace.codes[site]))
        tokens, vectors = codes.shape[1:]
        similar = (codes != ZERO) & (codes != ITSELF)
        offset = torch.tensor(offsets)[torch.where(similar, codes, 0).long()]
        ends = [resolve_pointers(torch.arange(tokens)[:, None] - part, grid.num_frames) for part in offset]
        out["mask_zero"][site] = (codes == ZERO)[:, None]
        out["mask_similar"][site] = similar[:, None]
        out["group_idx"][site] = (torch.stack(ends) * vectors + torch.arange(vectors)).int()[:, None]
    return out


def assert_same(one: dict, other: dict) -> None:
    for kind, site in product(("mask_zero", "mask_similar", "group_idx"), SITES):
        a, b = one[kind][site], other[kind][site]
        assert a.dtype == b.dtype and torch.equal(a, b), (kind, site)


@settings(max_examples=40, deadline=None)
@given(trace=traces())
def test_files_are_lossless(tmp_path_factory, trace):
    folder = tmp_path_factory.mktemp("trace")
    trace.save(folder / "a.trace")
    loaded = Trace.load(folder / "a.trace")
    assert (loaded.grid, loaded.frame_block, loaded.block) == (trace.grid, trace.frame_block, trace.block)
    for site in SITES:
        assert torch.equal(torch.stack(list(loaded.codes[site])), trace.codes[site])
    assert_same(loaded.to_dict(), reference(trace))
    loaded.save(folder / "b.trace")  # copied, not compressed again
    assert (folder / "b.trace").read_bytes() == (folder / "a.trace").read_bytes()
    loaded.save_pth(folder / "a.pth")
    assert_same(torch.load(folder / "a.pth", weights_only=True), reference(trace))


def small_trace() -> Trace:
    grid = VisualGrid(0, 8, 2, 2, 2, 4, 2)
    codes = torch.tensor([0, 1, 2, 0, 4, 4, 4, 255], dtype=torch.uint8)[None, :, None].expand(2, 8, 3)
    codes = codes.clone()
    codes[:, 0], codes[:, 1, 1] = 0, 255
    return Trace(grid, {site: codes for site in SITES}, 2, 2)


def test_pth_is_what_torch_would_write(tmp_path):
    trace = small_trace()
    trace.save_pth(tmp_path / "ours.pth")
    torch.save(trace.to_dict(), tmp_path / "torch.pth")
    for options in ({}, {"mmap": True}):
        ours = torch.load(tmp_path / "ours.pth", weights_only=True, **options)
        theirs = torch.load(tmp_path / "torch.pth", weights_only=True, **options)
        assert_same(ours, theirs)
        assert ours["group_idx"]["query"].is_contiguous()


def test_a_recorded_trace_can_be_read_twice():
    writer = TraceWriter()
    trace = small_trace()
    for layer, site in product(range(2), SITES):
        writer.add(layer, site, trace.codes[site][layer])
    first = writer.read(trace.grid, 2, 2, None)
    assert_same(first.to_dict(), trace.to_dict())
    assert_same(writer.read(trace.grid, 2, 2, None).to_dict(), trace.to_dict())


def test_every_cut_and_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.trace"
    trace = small_trace()
    trace.save(path)
    whole, expected = path.read_bytes(), trace.to_dict()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole trace file"):
            Trace.load(path).to_dict()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        try:
            read = Trace.load(path).to_dict()
        except UserError:
            continue
        for kind, site in product(("mask_zero", "mask_similar"), SITES):
            assert torch.equal(read[kind][site], expected[kind][site])  # a changed number of the grid is still a grid


def forged(path, changes: dict, data: bytes = b"", vectors: int = 3) -> None:
    """A file whose index is what a forger likes; every record is `data`."""
    record = {"vectors": vectors, "layers": [[0, len(data), zlib.crc32(data)]]}
    index = {
        "grid": small_trace().grid.to_dict(), "frame_block": 2, "block": 2, "max_doublings": None,
        "records": {site: record for site in SITES}, **changes,
    }  # fmt: skip
    text = json.dumps(index).encode()
    path.write_bytes(data + text + struct.pack("<Q", len(text)) + MAGIC)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": {}},
        {"grid": {**small_trace().grid.to_dict(), "length": 1 << 40}},
        {"grid": {**small_trace().grid.to_dict(), "length": True}},
        {
            "frame_block": 10**9,
            "block": 10**9,
            "grid": {**small_trace().grid.to_dict(), "height": 10**9, "width": 10**9},
        },
        {"block": "2"},
        {"records": {site: {"vectors": 3, "layers": [[0, 1 << 39, 0]]} for site in SITES}},
        {"records": {site: {"vectors": 1 << 39, "layers": [[0, 0, 0]]} for site in SITES}},
        {"records": {site: {"vectors": 3, "layers": []} for site in SITES}},
        {"records": []},
        {"max_doublings": -1},
    ],
)
def test_a_forged_index_is_refused(tmp_path, changes):
    forged(tmp_path / "a.trace", changes, zlib.compress(bytes(24)))
    with pytest.raises(UserError, match="not a whole trace file"):
        Trace.load(tmp_path / "a.trace").to_dict()


def test_a_decompression_bomb_is_not_unpacked(tmp_path):
    forged(tmp_path / "a.trace", {}, zlib.compress(bytes(1 << 28)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not 8 × 3 codes"):
        Trace.load(tmp_path / "a.trace").to_dict()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("code", [1, 7, 8, 254])
def test_impossible_codes_are_refused(tmp_path, code):
    forged(tmp_path / "a.trace", {}, zlib.compress(bytes([code]) + bytes(23)))
    with pytest.raises(UserError, match="a vector follows"):
        Trace.load(tmp_path / "a.trace").to_dict()


def test_other_files_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "pickle.trace")
    np.savez(tmp_path / "array.npz", a=np.zeros(3))
    for name in ("pickle.trace", "array.npz"):
        with pytest.raises(UserError, match="not a whole trace file"):
            Trace.load(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        Trace.load(tmp_path / "none.trace")


LARGE = """
import resource, sys, time
from pathlib import Path
import torch
from focuslib.grid import VisualGrid
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import Trace, TraceWriter
torch.set_num_threads(1)
layers, folder = int(sys.argv[1]), Path(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print("start", peak())
grid = VisualGrid(14, 11648, 64, 13, 13, 182, 14)
writer, generator = TraceWriter(), torch.Generator().manual_seed(0)
shares = {3: .4, 6: .3, 9: .2, 18: .15, 26: .1}
tokens = torch.arange(grid.length)
for layer in range(layers):
    for site in SITES:
        vectors = 592 if site == "down_proj" else 112
        codes = torch.full((grid.length, vectors), 255, dtype=torch.uint8)
        random = torch.rand((len(tokens), vectors), generator=generator)
        draw = torch.randint(1, 8, random.shape, generator=generator, dtype=torch.uint8)
        found = torch.where(random < .55, draw, 0)  # published: 83 % of the computation is saved, with pruning
        found[tokens < 200] = 0
        codes[tokens] = found
        writer.add(layer, site, codes)
    if layer in shares:
        kept = torch.randperm(len(tokens), generator=generator)[: int(grid.length * shares[layer])]
        tokens = tokens[kept].sort().values
trace = writer.read(grid, 2, 2, None)
trace.save(folder / "large.trace")
Trace.load(folder / "large.trace").save_pth(folder / "large.pth")
print((folder / "large.trace").stat().st_size, (folder / "large.pth").stat().st_size)
print("peak", peak())
"""


def record_large(layers: int, folder) -> float:
    """Record and export a trace of a 7B model's shape in a process of its own; its peak memory in GiB."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(layers), str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_layers(tmp_path):
    """One and four layers of a 7B model's 28 (all of them take half a minute); the rest of the trace is on disk."""
    one, four = record_large(1, tmp_path), record_large(4, tmp_path)
    assert four < 2.0 and four - one < 0.15  # a layer's .pth alone is 73 MB
