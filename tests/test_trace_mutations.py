"""A damaged native trace is refused in one line or read as it was written; never otherwise, whatever was changed."""

import io
import json
import random
import re
import resource
import struct
import time
import zipfile
from collections import Counter

import pytest
import torch
from test_trace import GOLDEN, golden_trace

from focuslib.errors import UserError
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import Trace


def entries(whole: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [(entry, archive.read(entry)) for entry in archive.infolist()]


def packed(parts: list[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    """An archive of these entries, whose own check sums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, data in parts:
            archive.writestr(zipfile.ZipInfo(entry.filename), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def any_byte(whole: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(whole))
    return whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :]


def any_bit(whole: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(whole))
    return whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]


def header_byte(whole: bytes, rng: random.Random) -> bytes:
    """A byte of what zip itself writes: local headers, the directory, its end."""
    place = rng.choice([match.start() for match in re.finditer(rb"PK", whole)]) + rng.randrange(46)
    return whole[:place] + bytes([rng.choice([0, 1, 8, 255, rng.randrange(256)])]) + whole[place + 1 :]


def several_bytes(whole: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(2, 9)):
        whole = any_byte(whole, rng)
    return whole


def large_number(whole: bytes, rng: random.Random) -> bytes:
    place, size = rng.randrange(len(whole) - 8), rng.choice([2, 4, 8])
    return whole[:place] + rng.choice([b"\xff", b"\x7f", b"\x00"]) * size + whole[place + size :]


def truncated(whole: bytes, rng: random.Random) -> bytes:
    return whole[: rng.randrange(len(whole))]


def beheaded(whole: bytes, rng: random.Random) -> bytes:
    return whole[rng.randrange(1, len(whole)) :]


def extended(whole: bytes, rng: random.Random) -> bytes:
    more = rng.choice([rng.randbytes(rng.randrange(1, 200)), bytes(100_000), whole])
    return rng.choice([whole + more, more + whole])


def shifted(whole: bytes, rng: random.Random) -> bytes:
    """A byte more or less somewhere."""
    place = rng.randrange(len(whole))
    return rng.choice([whole[:place] + whole[place + 1 :], whole[:place] + rng.randbytes(1) + whole[place:]])


def zip64_end(whole: bytes, rng: random.Random) -> bytes:
    """A directory of up to 2⁶⁴ bytes."""
    size, offset = rng.choice([0, 1 << 32, 1 << 63, (1 << 64) - 1]), rng.choice([0, 1 << 40, (1 << 64) - 1])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, offset)
    return whole[:-22] + record + struct.pack("<4sLQL", b"PK\6\7", 0, len(whole) - 22, 1) + whole[-22:]


def index_digit(whole: bytes, rng: random.Random) -> bytes:
    """Another digit in the index, packed again with the check sum of that."""
    *others, (entry, text) = entries(whole)
    place = rng.choice([match.start() for match in re.finditer(rb"\d", text)])
    digit = rng.choice([d for d in b"0123456789" if d != text[place]])
    return packed([*others, (entry, text[:place] + bytes([digit]) + text[place + 1 :])])


def index_number(whole: bytes, rng: random.Random) -> bytes:
    """A number of the index in its place, another one, or gone."""
    *others, (entry, text) = entries(whole)
    index = json.loads(text)
    target = rng.choice([index, index["grid"], *index["sites"].values()])
    key = rng.choice(list(target))
    if rng.random() < 0.2:
        del target[key]
    else:
        target[key] = rng.choice([0, 1, -1, 1 << 62, 1.5, True, None, "2", [], {}])
    return packed([*others, (entry, json.dumps(index, separators=(",", ":")).encode())])


def swapped_entries(whole: bytes, rng: random.Random) -> bytes:
    """Two layers under each other's names."""
    parts = entries(whole)
    one, other = rng.sample(range(len(parts)), 2)
    (name, data), (other_name, other_data) = parts[one], parts[other]
    parts[one], parts[other] = (name, other_data), (other_name, data)
    return packed(parts)


def reordered_entries(whole: bytes, rng: random.Random) -> bytes:
    return packed(rng.sample(entries(whole), len(entries(whole))))


def duplicated_entry(whole: bytes, rng: random.Random) -> bytes:
    """An entry twice, the second time with what another one holds."""
    parts = entries(whole)
    parts.insert(rng.randrange(len(parts) + 1), (rng.choice(parts)[0], rng.choice(parts)[1]))
    return packed(parts)


def missing_entry(whole: bytes, rng: random.Random) -> bytes:
    parts = entries(whole)
    del parts[rng.randrange(len(parts))]
    return packed(parts)


def changed_codes(whole: bytes, rng: random.Random) -> bytes:
    """A layer with another code, packed again with the check sum of that."""
    parts = entries(whole)
    place = rng.randrange(len(parts))
    parts[place] = (parts[place][0], any_bit(parts[place][1], rng))
    return packed(parts)


def otherwise_packed(whole: bytes, rng: random.Random) -> bytes:
    """Some entries stored, or compressed in another way."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, data in entries(whole):
            archive.writestr(entry.filename, data, rng.choice([0, 8, 8, 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    return any_byte(buffer.getvalue(), rng) if rng.random() < 0.5 else buffer.getvalue()


MUTATIONS = (
    any_byte, any_byte, any_byte, any_bit, any_bit, header_byte, header_byte, several_bytes, large_number, truncated,
    beheaded, extended, shifted, zip64_end, index_digit, index_digit, index_number, swapped_entries, reordered_entries,
    duplicated_entry, missing_entry, changed_codes, otherwise_packed,
)  # fmt: skip


def read_all(trace: Trace) -> list[torch.Tensor]:
    """Everything that a simulator gets."""
    layers = range(trace.num_layers)
    masks = [mask(site) for site in SITES for mask in (trace.mask_zero, trace.mask_similar)]
    return masks + [trace.group_index(site, layer) for site in SITES for layer in layers]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_thousand_mutated_traces_are_refused_or_read_as_written(tmp_path):
    path, rng, outcomes = tmp_path / "a.trace", random.Random(9), Counter()
    golden_trace().save(path)
    whole, expected = path.read_bytes(), read_all(golden_trace())
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for number in range(2000):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        path.write_bytes(mutation(whole, rng))
        try:
            trace = Trace.load(path)
            read = read_all(trace)
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{path}: not a whole trace file ("), str(error)
            assert len(str(error)) < len(str(path)) + 300
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        what = f"mutation {number}, {mutation.__name__}"
        assert len(read) == len(expected) and all(map(torch.equal, read, expected)), what
        assert (trace.grid, trace.frame_block, trace.block, trace.max_doublings) == (golden_trace().grid, 2, 2, 3), what
    assert outcomes["refused"] > 1000 and outcomes["read"] > 100, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 128 * 1024
    assert time.process_time() - started < 60


def test_damaged_files_of_the_first_format_are_refused_in_one_line(tmp_path):
    """That format protects its codes; a changed number of its index may be another number."""
    path, rng, outcomes = tmp_path / "a.trace", random.Random(9), Counter()
    whole, expected = (GOLDEN / "trace_v1.trace").read_bytes(), golden_trace()
    for number in range(500):
        mutation = (any_byte, any_bit, several_bytes, large_number, truncated, beheaded, shifted)[number % 7]
        path.write_bytes(mutation(whole, rng))
        try:
            read = Trace.load(path)
            codes = {site: list(read.codes[site]) for site in SITES}
            read_all(read)
        except UserError as error:
            assert "\n" not in str(error), str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        whole_codes = {layer.numpy().tobytes() for site in SITES for layer in expected.codes[site]}
        assert all(layer.numpy().tobytes() in whole_codes for layers in codes.values() for layer in layers)
    assert outcomes["refused"] > 300, outcomes
