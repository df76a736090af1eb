"""Sparse traces: what each vector of each GEMM site did, and the files an architecture simulator reads.

The native file (.trace) holds one small code a vector, compressed layer by layer: about a fortieth of the simulator's
.pth or less, and read one layer at a time. It is written while a prefill runs, so recording needs one layer in memory.

    the records: each a zlib stream of one site's codes in one layer, [S, V] uint8
    the index: JSON; geometry, and offset, size and CRC-32 of each record
    the end: the size of the index (8 bytes, little-endian) and MAGIC
"""

import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import ITSELF, MAX_CANDIDATES, ZERO, resolve_pointers
from focuslib.prefill.ops import SITES
from focuslib.prefill.pth import StreamedTensor, save_streamed

MAGIC = b"focustrace1\n"
# What a file may ask for; far above any model, far below what would exhaust a machine.
_MAX_TOKENS, _MAX_LAYER, _MAX_LAYERS, _MAX_INDEX, _MAX_INT = 1 << 22, 1 << 28, 4096, 1 << 26, 1 << 40


@dataclass(frozen=True)
class BlockGeometry:
    """Which candidates the codes of a trace count: the block they come from, and how far pointers were followed.

    frame_block, block: frames and side of the block (1, 1: a vector has no candidates). max_doublings: pointer-doubling
    steps; None: the published number, the grid's frames.
    """

    frame_block: int = 1
    block: int = 1
    max_doublings: int | None = None


@dataclass
class Trace:
    """The concentration of one prefill, one small code per vector.

    codes: site → one [S, V] uint8 a layer, over the S original visual tokens: ITSELF, ZERO (pruned or all-zero), or
        k for a vector that follows its k-th candidate (order of VisualGrid.block_offsets). A tensor [layers, S, V], or
        the layers of a file, read when asked for.
    grid: the visual tokens' geometry. frame_block, block: the block the candidates come from.
    max_doublings: how far pointers were followed (None: the published number, grid.num_frames).
    """

    grid: VisualGrid
    codes: Mapping[str, Sequence[Tensor]]
    frame_block: int
    block: int
    max_doublings: int | None = None

    @property
    def num_layers(self) -> int:
        return len(next(iter(self.codes.values())))

    def mask_zero(self, site: str) -> Tensor:
        """[layers, S, V] bool: pruned or all-zero vectors."""
        return torch.stack([_zero(codes) for codes in self.codes[site]])

    def mask_similar(self, site: str) -> Tensor:
        """[layers, S, V] bool: vectors that follow a candidate."""
        return torch.stack([_similar(codes) for codes in self.codes[site]])

    def group_index(self, site: str, layer: int) -> Tensor:
        """[S, V] int32: flat index p·V + v where each vector's pointer ends. Raises UserError for impossible codes."""
        return self._group_index(self.codes[site][layer])

    def _group_index(self, codes: Tensor) -> Tensor:
        tokens, vectors = codes.shape
        offsets = torch.tensor([0, *self.grid.block_offsets(self.frame_block, self.block)])
        candidate = torch.where(codes == ZERO, ITSELF, codes).long()
        if len(candidate) and int(candidate.max()) >= len(offsets):
            raise UserError(f"trace: a vector follows candidate {int(candidate.max())}; a block has {len(offsets) - 1}")
        pointer = torch.arange(tokens)[:, None] - offsets[candidate]
        if len(pointer) and int(pointer.min()) < 0:
            raise UserError("trace: a vector follows a token before the first")
        doublings = self.grid.num_frames if self.max_doublings is None else self.max_doublings
        root = resolve_pointers(pointer, doublings)
        return (root * vectors + torch.arange(vectors)).int()

    def to_dict(self) -> dict[str, dict[str, Tensor]]:
        """The simulator's layout: {mask_zero, mask_similar, group_idx}, each site → [layers, 1, S, V]."""
        return {
            kind: {site: torch.cat([piece[None] for piece in tensor.pieces])[:, None] for site, tensor in sites.items()}
            for kind, sites in self._streamed().items()
        }

    def save_pth(self, path: Path) -> None:
        """Write the simulator's file atomically, a layer at a time; it loads with torch.load(weights_only=True)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_streamed(self._streamed(), partial)
        partial.replace(path)

    def _streamed(self) -> dict[str, dict[str, StreamedTensor]]:
        def tensors(dtype: torch.dtype, of: Callable[[Tensor], Tensor]) -> dict[str, StreamedTensor]:
            return {
                site: StreamedTensor(
                    (len(self.codes[site]), 1, *self.codes[site][0].shape), dtype, map(of, self.codes[site])
                )
                for site in SITES
            }

        return {
            "mask_zero": tensors(torch.bool, _zero),
            "mask_similar": tensors(torch.bool, _similar),
            "group_idx": tensors(torch.int32, self._group_index),
        }

    def save(self, path: Path) -> None:
        """Write the native file (.trace) atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            writer = TraceWriter(file)
            for site, layers in self.codes.items():
                for layer in range(len(layers)):
                    if isinstance(layers, _Layers):
                        writer.add_compressed(layer, site, layers.shape[2], layers.compressed(layer))
                    else:
                        writer.add(layer, site, layers[layer])
            writer.close(self.grid, self.frame_block, self.block, self.max_doublings)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Open a native file. Raises UserError if it is not a whole one; never runs code from the file."""
        try:
            return cls.open(path.open("rb"), str(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a .trace file") from error

    @classmethod
    def open(cls, file: BinaryIO, name: str) -> "Trace":
        """As `load`, of an open file, which the trace goes on reading. name: of the file, for errors."""
        index, end = _read_index(file, name)
        try:
            numbers = {key: _integer(value) for key, value in index["grid"].items()}
            grid = VisualGrid(**numbers)
            frame_block, block = _integer(index["frame_block"]), _integer(index["block"])
            doublings = None if index["max_doublings"] is None else _integer(index["max_doublings"])
            sides = (min(frame_block, grid.num_frames), min(block, grid.height), min(block, grid.width))
            if grid.length > _MAX_TOKENS or not 1 <= sides[0] * sides[1] * sides[2] <= MAX_CANDIDATES + 1:
                raise ValueError("a grid or a block of impossible size")
            codes = {site: _Layers(file, name, grid.length, index["records"][site], end) for site in SITES}
            if len({len(layers) for layers in codes.values()}) != 1:
                raise ValueError("not every site has the same layers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(name, str(error)) from error
        return cls(grid, codes, frame_block, block, doublings)


class TraceWriter:
    """Takes codes as a prefill runs, compressed into a file. Without a file: one that vanishes with its reader."""

    def __init__(self, file: BinaryIO | None = None):
        self.file = file or tempfile.TemporaryFile()  # noqa: SIM115  the trace reads it later
        self.records: dict[str, dict[str, Any]] = {}
        self.closed = False

    def add(self, layer: int, site: str, codes: Tensor) -> None:
        """Store the codes [S, V] uint8 of a site; its layers come in order."""
        self.add_compressed(layer, site, codes.shape[1], zlib.compress(codes.cpu().contiguous().numpy().data, 6))

    def add_compressed(self, layer: int, site: str, vectors: int, data: bytes) -> None:
        """The same, of a record that another file holds."""
        record = self.records.setdefault(site, {"vectors": vectors, "layers": []})
        if layer != len(record["layers"]):
            raise ValueError(f"layer {layer} of {site} after {len(record['layers'])} layers")
        record["layers"].append([self.file.tell(), len(data), zlib.crc32(data)])
        self.file.write(data)

    def close(self, grid: VisualGrid, frame_block: int, block: int, max_doublings: int | None) -> None:
        """Write the index, after which the file can be read."""
        index = {
            "grid": grid.to_dict(), "frame_block": frame_block, "block": block, "max_doublings": max_doublings,
            "records": self.records,
        }  # fmt: skip
        data = json.dumps(index, separators=(",", ":")).encode()
        self.file.write(data + struct.pack("<Q", len(data)) + MAGIC)
        self.file.flush()
        self.closed = True

    def read(self, grid: VisualGrid, frame_block: int, block: int, max_doublings: int | None) -> Trace:
        """The trace of what was added; nothing can be added after."""
        if not self.closed:
            self.close(grid, frame_block, block, max_doublings)
        return Trace.open(self.file, "trace")


class _Layers(Sequence):
    """One site's layers in a native file: item ℓ is its codes, [S, V] uint8."""

    def __init__(self, file: BinaryIO, name: str, tokens: int, record: dict[str, Any], end: int):
        self.file, self.name = file, name
        self.records = [tuple(map(_integer, entry)) for entry in record["layers"]]
        self.shape = (len(self.records), tokens, _integer(record["vectors"]))
        if not 1 <= len(self.records) <= _MAX_LAYERS or not 1 <= self.shape[1] * self.shape[2] <= _MAX_LAYER:
            raise ValueError("a number of layers or vectors that no model has")
        if any(len(entry) != 3 or entry[0] + entry[1] > end for entry in self.records):
            raise ValueError("a record outside the file")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, layer: int) -> Tensor:
        _, tokens, vectors = self.shape
        size = tokens * vectors
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(self.compressed(layer), size + 1)
        except zlib.error as error:
            raise _damaged(self.name, str(error)) from error
        if len(data) != size or not stream.eof:
            raise _damaged(self.name, f"layer {layer} is not {tokens} × {vectors} codes")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tokens, vectors)

    def compressed(self, layer: int) -> bytes:
        """The layer as it is in the file."""
        offset, size, crc = self.records[layer]
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise _damaged(self.name, f"layer {layer} fails its check sum")
        return data


def _read_index(file: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """The index of a native file, and where it begins."""
    tail = 8 + len(MAGIC)
    end = file.seek(0, 2) - tail
    if end < 0:
        raise _damaged(name, "it is too short")
    file.seek(end)
    last = file.read(tail)
    (size,) = struct.unpack("<Q", last[:8])
    if last[8:] != MAGIC or size > min(end, _MAX_INDEX):
        raise _damaged(name, "its end is missing")
    file.seek(end - size)
    try:
        index = json.loads(file.read(size))
    except (ValueError, RecursionError) as error:
        raise _damaged(name, "its index is unreadable") from error
    return index, end - size


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INT:
        raise ValueError(f"{value!r} where a number should be")
    return value


def _damaged(name: str, why: str) -> UserError:
    return UserError(f"{name}: not a whole trace file ({why}); run its cell again")


def _zero(codes: Tensor) -> Tensor:
    return codes == ZERO


def _similar(codes: Tensor) -> Tensor:
    return (codes != ZERO) & (codes != ITSELF)
