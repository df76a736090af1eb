"""The native trace: lossless, small, bounded in memory, safe against broken files; and the simulator's file."""

import dataclasses
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import ITSELF, ZERO, concentrate, resolve_pointers
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import Trace, TraceWriter
from focuslib.prefill.trace_file import write_codes, write_index
from focuslib.prefill.trace_v1 import MAGIC

GOLDEN = Path(__file__).parent / "golden"


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


def forged_v1(path, changes: dict, data: bytes) -> None:
    """A file whose index is what a forger likes; every record is `data`, compressed."""
    data = zlib.compress(data)
    record = {"vectors": 3, "layers": [[0, len(data), zlib.crc32(data)]]}
    index = {
        "grid": small_trace().grid.to_dict(), "frame_block": 2, "block": 2, "max_doublings": None,
        "records": {site: record for site in SITES}, **changes,
    }  # fmt: skip
    text = json.dumps(index).encode()
    path.write_bytes(data + text + struct.pack("<Q", len(text)) + MAGIC)


def forged_zip(path, changes: dict, data: bytes) -> None:
    """The same as a zip archive, in which every check sum is right."""
    with zipfile.ZipFile(path, "w") as archive:
        crcs = [write_codes(archive, site, 0, data) for site in SITES]
        index = {
            "grid": small_trace().grid.to_dict(), "frame_block": 2, "block": 2, "max_doublings": None,
            "sites": {site: {"vectors": 3, "layers": [crc]} for site, crc in zip(SITES, crcs, strict=True)}, **changes,
        }  # fmt: skip
        write_index(archive, index)


BOTH = pytest.mark.parametrize("forged", [forged_v1, forged_zip])


@BOTH
@pytest.mark.parametrize(
    "changes",
    [
        {"grid": {}},
        {"grid": {**small_trace().grid.to_dict(), "length": 1 << 40}},
        {"grid": {**small_trace().grid.to_dict(), "length": True}},
        {"grid": {**small_trace().grid.to_dict(), "l\ngth": 8}},
        {
            "frame_block": 10**9,
            "block": 10**9,
            "grid": {**small_trace().grid.to_dict(), "height": 10**9, "width": 10**9},
        },
        {"block": "2"},
        {"max_doublings": -1},
    ],
)
def test_a_forged_geometry_is_refused(tmp_path, forged, changes):
    forged(tmp_path / "a.trace", changes, bytes(24))
    with pytest.raises(UserError, match=r"not a whole trace file .*\Z"):
        Trace.load(tmp_path / "a.trace").to_dict()


@pytest.mark.parametrize(
    ("forged", "changes"),
    [
        (forged_v1, {"records": {site: {"vectors": 3, "layers": [[0, 1 << 39, 0]]} for site in SITES}}),
        (forged_v1, {"records": {site: {"vectors": 3, "layers": [[-8, 8, 0]]} for site in SITES}}),
        (forged_v1, {"records": {site: {"vectors": 1 << 39, "layers": [[0, 0, 0]]} for site in SITES}}),
        (forged_v1, {"records": {site: {"vectors": 3, "layers": []} for site in SITES}}),
        (forged_v1, {"records": []}),
        (forged_zip, {"sites": {site: {"vectors": 1 << 39, "layers": [0]} for site in SITES}}),
        (forged_zip, {"sites": {site: {"vectors": 3, "layers": []} for site in SITES}}),
        (forged_zip, {"sites": {site: {"vectors": 3, "layers": {"0": 0}} for site in SITES}}),
        (forged_zip, {"sites": {site: {"vectors": 3, "layers": [0, 0]} for site in SITES}}),
        (forged_zip, {"sites": {"q_proj": {"vectors": 3, "layers": [0]}}}),
        (forged_zip, {"sites": []}),
        (forged_zip, {"format": 3}),
        (forged_zip, {"dtype": "int8"}),
        (forged_zip, {"more": [0] * (1 << 21)}),
    ],
)
def test_a_forged_index_is_refused(tmp_path, forged, changes):
    forged(tmp_path / "a.trace", changes, bytes(24))
    with pytest.raises(UserError, match="not a whole trace file"):
        Trace.load(tmp_path / "a.trace").to_dict()


@BOTH
def test_a_decompression_bomb_is_not_unpacked(tmp_path, forged):
    forged(tmp_path / "a.trace", {}, bytes(1 << 28))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not 8 × 3 codes"):
        Trace.load(tmp_path / "a.trace").to_dict()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@BOTH
@pytest.mark.parametrize("code", [1, 7, 8, 254])
def test_impossible_codes_are_refused(tmp_path, forged, code):
    forged(tmp_path / "a.trace", {}, bytes([code]) + bytes(23))
    with pytest.raises(UserError, match="a vector follows"):
        Trace.load(tmp_path / "a.trace").to_dict()


def golden_trace() -> Trace:
    """tests/golden/trace_v1.trace: every layer and site another; the second frame follows the first."""
    codes = {}
    for skip, site in enumerate(SITES, 2):
        place = torch.arange(8 * skip).view(8, skip) + torch.arange(2)[:, None, None]  # [2, 8, V]
        follows = torch.where(torch.arange(8)[:, None] < 4, ITSELF, 4)
        codes[site] = torch.where(place % (skip + 1) == 0, ZERO, follows).to(torch.uint8)
    return Trace(VisualGrid(0, 8, 2, 2, 2, 4, 2), codes, 2, 2, 3)


def test_the_first_format_is_read_and_becomes_the_present_one(tmp_path):
    old = Trace.load(GOLDEN / "trace_v1.trace")
    golden_trace().save(tmp_path / "new.trace")
    old.save(tmp_path / "old.trace")
    assert (tmp_path / "old.trace").read_bytes() == (tmp_path / "new.trace").read_bytes()
    new = Trace.load(tmp_path / "old.trace")
    for read in (old, new):
        assert (read.grid, read.frame_block, read.block, read.max_doublings) == (golden_trace().grid, 2, 2, 3)
        for site in SITES:
            assert torch.equal(torch.stack(list(read.codes[site])), golden_trace().codes[site])
        assert_same(read.to_dict(), golden_trace().to_dict())


def test_a_changed_trace_is_written_as_changed(tmp_path):
    golden_trace().save(tmp_path / "a.trace")
    for changes in ({"block": 1}, {"max_doublings": 0}, {"codes": {site: small_trace().codes[site] for site in SITES}}):
        changed = dataclasses.replace(Trace.load(tmp_path / "a.trace"), **changes)
        changed.save(tmp_path / "b.trace")
        read = Trace.load(tmp_path / "b.trace")
        assert (read.block, read.max_doublings) == (changed.block, changed.max_doublings)
        assert torch.equal(read.codes["query"][1], changed.codes["query"][1])


def test_a_native_file_is_an_ordinary_archive(tmp_path):
    golden_trace().save(tmp_path / "a.trace")
    with zipfile.ZipFile(tmp_path / "a.trace") as archive:
        assert archive.testzip() is None
        assert archive.read("down_proj/001.u8") == golden_trace().codes["down_proj"][1].numpy().tobytes()
        index = json.loads(archive.read("index.json"))
        assert index["format"] == 2 and index["grid"] == golden_trace().grid.to_dict()
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}


WRITE = """
import sys
sys.path.append("tests")
from test_trace import golden_trace
golden_trace().save(sys.argv[1])
golden_trace().save_pth(sys.argv[2])
"""


def test_bytes_are_the_same_in_every_process(tmp_path):
    """Paths may be strings."""
    for seed in ("1", "2"):
        paths = [str(tmp_path / f"{seed}.trace"), str(tmp_path / f"{seed}.pth")]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC{seed}"}
        subprocess.run([sys.executable, "-c", WRITE, *paths], cwd=GOLDEN.parents[1], env=environment, check=True)
    for ending in ("trace", "pth"):
        assert (tmp_path / f"1.{ending}").read_bytes() == (tmp_path / f"2.{ending}").read_bytes()
    assert_same(Trace.load(str(tmp_path / "1.trace")).to_dict(), golden_trace().to_dict())
    assert zipfile.ZipFile(tmp_path / "1.pth").testzip() is None


def test_a_failed_write_leaves_what_was_there(tmp_path):
    golden_trace().save(tmp_path / "a.trace")
    before = (tmp_path / "a.trace").read_bytes()
    codes = golden_trace().codes
    with pytest.raises(UserError, match="record uint8"):
        dataclasses.replace(golden_trace(), codes={**codes, "query": codes["query"].long()}).save(tmp_path / "a.trace")
    assert (tmp_path / "a.trace").read_bytes() == before


def test_a_site_that_lacks_layers_is_named():
    writer, trace = TraceWriter(), small_trace()
    for layer, site in product(range(2), SITES[1:]):
        writer.add(layer, site, trace.codes[site][layer])
    with pytest.raises(UserError, match="q_proj was recorded in 0 of 2 layers"):
        writer.read(trace.grid, 2, 2, None)
    with pytest.raises(UserError, match=r"query in layer 2 are torch.int64 \[8, 3\]; record uint8"):
        writer.add(2, "query", trace.codes["query"][0].long())


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
from focuslib.prefill.trace_file import write_codes, write_index
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
