"""Sparse traces: what each vector of each GEMM site did, and the files an architecture simulator reads.

The native file (.trace, see trace_file) holds one small code a vector, compressed layer by layer: about a fortieth of
the simulator's .pth or less, and read one layer at a time. It is written while a prefill runs, so recording needs one
layer in memory.
"""

import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import Grid, grid_from_dict
from focuslib.kernels.similarity import ITSELF, MAX_CANDIDATES, ZERO, resolve_pointers
from focuslib.prefill.ops import SITES
from focuslib.prefill.pth import StreamedTensor, save_streamed
from focuslib.prefill.trace_file import DAMAGE, TraceFile, write_codes, write_index
from focuslib.prefill.trace_v1 import TraceFileV1, is_v1

# What a file may ask for; far above any model, far below what would exhaust a machine.
_MAX_TOKENS, _MAX_LAYER, _MAX_LAYERS, _MAX_INT = 1 << 22, 1 << 28, 4096, 1 << 40


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
        k for a vector that follows its k-th candidate (order of Grid.block_places). A tensor [layers, S, V], or
        the layers of a file, read when asked for.
    grid: the visual tokens' geometry. frame_block, block: the block the candidates come from.
    max_doublings: how far pointers were followed (None: the published number, grid.num_frames).
    """

    grid: Grid
    codes: Mapping[str, Sequence[Tensor]]
    frame_block: int
    block: int
    max_doublings: int | None = None

    @property
    def num_layers(self) -> int:
        return len(next(iter(self.codes.values())))

    @property
    def medium(self) -> Tensor:
        """Which image or video of the prompt each visual token belongs to: [S] int64 (see Grid.medium_of)."""
        return self.grid.medium_of()

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
        itself = torch.arange(tokens)
        numbers = torch.cat([itself[None], self.grid.candidates(itself, self.frame_block, self.block)])  # [C + 1, S]
        candidate = torch.where(codes == ZERO, ITSELF, codes).long()
        if len(candidate) and int(candidate.max()) >= len(numbers):
            raise UserError(f"trace: a vector follows candidate {int(candidate.max())}; a block has {len(numbers) - 1}")
        pointer = numbers.T.gather(1, candidate)
        if len(pointer) and int(pointer.min()) < 0:
            raise UserError("trace: a vector follows a token that is not there")
        doublings = self.grid.num_frames if self.max_doublings is None else self.max_doublings
        root = resolve_pointers(pointer, doublings)
        return (root * vectors + torch.arange(vectors)).int()

    def to_dict(self) -> dict[str, dict[str, Tensor]]:
        """The simulator's layout: {mask_zero, mask_similar, group_idx}, each site → [layers, 1, S, V]."""
        return {
            kind: {site: torch.cat([piece[None] for piece in tensor.pieces])[:, None] for site, tensor in sites.items()}
            for kind, sites in self._streamed().items()
        }

    def save_pth(self, path: str | Path) -> None:
        """Write the simulator's file atomically, a layer at a time; it loads with torch.load(weights_only=True)."""
        with _replacing(path) as partial:
            save_streamed(self._streamed(), partial)

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

    def save(self, path: str | Path) -> None:
        """Write the native file (.trace) atomically."""
        with _replacing(path) as partial, partial.open("wb") as file:
            if source := self._unchanged_file():
                source.seek(0)
                shutil.copyfileobj(source, file, 1 << 20)
                return
            with TraceWriter(file) as writer:
                for layer, site in product(range(self.num_layers), self.codes):  # the order of a prefill
                    writer.add(layer, site, self.codes[site][layer])
                writer.close(self.grid, self.frame_block, self.block, self.max_doublings)

    def _unchanged_file(self) -> BinaryIO | None:
        """The native file of which this trace is all, if there is one: nothing has to be compressed again."""
        source = self.codes.source if isinstance(self.codes, _FileCodes) else None
        geometry = _geometry(self.grid, self.frame_block, self.block, self.max_doublings)
        if isinstance(source, TraceFile) and geometry == {key: source.index[key] for key in geometry}:
            return source.file
        return None

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Open a native file, of this or the first format; never runs code from it.

        Raises
        ------
        UserError
            If there is no such file or it is not a whole one. A damaged layer is found when it is read.
        """
        try:
            return cls.open(Path(path).open("rb"), str(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a .trace file") from error

    @classmethod
    def open(cls, file: BinaryIO, name: str) -> "Trace":
        """As `load`, of an open file, which the trace goes on reading. name: of the file, for errors."""
        try:
            source = TraceFileV1(file) if is_v1(file) else TraceFile(file)
            index = source.index
            grid = grid_from_dict(_integers(index["grid"]))
            frame_block, block = _integer(index["frame_block"]), _integer(index["block"])
            doublings = None if index["max_doublings"] is None else _integer(index["max_doublings"])
            size = math.prod(grid.block_sides(frame_block, block))
            if grid.length > _MAX_TOKENS or not 1 <= size <= MAX_CANDIDATES + 1:
                raise ValueError("a grid or a block of impossible size")
            codes = _FileCodes(source, name, grid.length)
            if len({len(layers) for layers in codes.values()}) != 1:
                raise ValueError("not every site has the same layers")
        except DAMAGE as error:
            raise _damaged(name, error) from error
        return cls(grid, codes, frame_block, block, doublings)


class TraceWriter:
    """Takes codes as a prefill runs, compressed into a file. Without a file: one that vanishes with its reader.

    records: site → its number of vectors and the check sum of each layer so far.
    """

    def __init__(self, file: BinaryIO | None = None):
        self.file = file or tempfile.TemporaryFile()  # noqa: SIM115  the trace reads it later
        self.archive = zipfile.ZipFile(self.file, "w")
        self.records: dict[str, dict[str, Any]] = {}
        self.closed = False

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.close()

    def add(self, layer: int, site: str, codes: Tensor) -> None:
        """Store the codes [S, V] uint8 of a site; its layers come in order."""
        record = self.records.setdefault(site, {"vectors": codes.shape[1], "layers": []})
        if layer != len(record["layers"]):
            raise ValueError(f"layer {layer} of {site} after {len(record['layers'])} layers")
        if codes.dtype != torch.uint8 or codes.shape[1] != record["vectors"]:
            raise UserError(
                f"trace: the codes of {site} in layer {layer} are {codes.dtype} {list(codes.shape)}; "
                f"record uint8 of {record['vectors']} vectors a token in every layer"
            )
        record["layers"].append(write_codes(self.archive, site, layer, codes.cpu().numpy().tobytes()))

    def close(self, grid: Grid, frame_block: int, block: int, max_doublings: int | None) -> None:
        """Write the index, after which the file can be read.

        Raises
        ------
        UserError
            If a site lacks layers that another one has.
        """
        recorded = {site: len(self.records[site]["layers"]) if site in self.records else 0 for site in SITES}
        most = max(recorded.values())
        if least := [site for site in SITES if recorded[site] < most]:
            raise UserError(
                f"trace: {least[0]} was recorded in {recorded[least[0]]} of {most} layers; "
                f"a method must record {', '.join(SITES)} in each"
            )
        write_index(self.archive, {**_geometry(grid, frame_block, block, max_doublings), "sites": self.records})
        self.archive.close()
        self.file.flush()
        self.closed = True

    def read(self, grid: Grid, frame_block: int, block: int, max_doublings: int | None) -> Trace:
        """The trace of what was added; nothing can be added after."""
        if not self.closed:
            self.close(grid, frame_block, block, max_doublings)
        return Trace.open(self.file, "trace")


class _FileCodes(Mapping):
    """The codes of a native file: item `site` is its layers."""

    def __init__(self, source: TraceFile | TraceFileV1, name: str, tokens: int):
        self.source = source
        self.sites = {site: _Layers(source, name, tokens, site) for site in SITES}

    def __getitem__(self, site: str) -> "_Layers":
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class _Layers(Sequence):
    """One site's layers in a native file: item ℓ is its codes, [S, V] uint8, read when asked for."""

    def __init__(self, source: TraceFile | TraceFileV1, name: str, tokens: int, site: str):
        record = source.index["sites"][site]
        self.source, self.name, self.site = source, name, site
        self.shape = (len(record["layers"]), tokens, _integer(record["vectors"]))
        if not 1 <= self.shape[0] <= _MAX_LAYERS or not 1 <= tokens * self.shape[2] <= _MAX_LAYER:
            raise ValueError("a number of layers or vectors that no model has")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  no slices
        layer = range(len(self))[layer]
        _, tokens, vectors = self.shape
        try:
            data = self.source.read(self.site, layer, tokens * vectors)
            if len(data) != tokens * vectors:
                raise ValueError(f"layer {layer} of {self.site} is not {tokens} × {vectors} codes")
        except DAMAGE as error:
            raise _damaged(self.name, error) from error
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tokens, vectors)


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def _geometry(grid: Grid, frame_block: int, block: int, max_doublings: int | None) -> dict[str, Any]:
    """What an index says of the grid and the block."""
    return {"grid": grid.to_dict(), "frame_block": frame_block, "block": block, "max_doublings": max_doublings}


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INT:
        raise ValueError(f"{value!r} where a number should be")
    return value


def _integers(value: Any) -> Any:
    """A grid's values: numbers, and tuples of such."""
    if isinstance(value, dict):
        return {key: _integers(item) for key, item in value.items()}
    return tuple(map(_integers, value)) if isinstance(value, list) else _integer(value)


def _damaged(name: str, error: Exception) -> UserError:
    why = " ".join(str(error).split())[:200] or "it ends early"  # a name in a damaged index may hold anything
    return UserError(f"{name}: not a whole trace file ({why}); run its cell again")


def _zero(codes: Tensor) -> Tensor:
    return codes == ZERO


def _similar(codes: Tensor) -> Tensor:
    return (codes != ZERO) & (codes != ITSELF)
