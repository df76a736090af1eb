"""Write what torch.save would, one piece of a tensor after another, so that no tensor has to be in memory whole.

The format is torch's own: a ZIP archive of stored entries, a pickle that describes the tensors, and one entry of raw
values a tensor. `torch.load(path, weights_only=True)` reads it. torch.serialization.skip_data would leave room for the
values, but with check sums of nothing, and in a layout that differs between versions of torch.
"""

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_STORAGES = {torch.bool: torch.BoolStorage, torch.int32: torch.IntStorage}


@dataclass
class StreamedTensor:
    """A tensor to be written: its shape, its dtype (bool or int32) and its values as tensors, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


class _Pickler(pickle.Pickler):
    """Pickles empty tensors as torch.save does; the k-th storage it meets is that of the k-th tensor."""

    def __init__(self, file: BinaryIO, tensors: list[StreamedTensor]):
        super().__init__(file, protocol=2)
        self.tensors = enumerate(tensors)

    def persistent_id(self, obj: Any) -> tuple | None:
        if not torch.is_storage(obj):
            return None
        key, tensor = next(self.tensors)
        return "storage", _STORAGES[tensor.dtype], str(key), "cpu", math.prod(tensor.shape)


def save_streamed(value: dict[str, dict[str, StreamedTensor]], path: str | Path) -> None:
    """Write a dictionary of dictionaries of tensors; memory holds one piece at a time.

    Raises
    ------
    ValueError
        If the pieces of a tensor are not exactly its values.
    """
    tensors = [tensor for inner in value.values() for tensor in inner.values()]
    empty = {  # of the right shapes; memory that nobody writes to takes no room
        outer: {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in inner.items()}
        for outer, inner in value.items()
    }
    buffer = io.BytesIO()
    _Pickler(buffer, tensors).dump(empty)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), buffer.getvalue())
        archive.writestr(_entry("byteorder"), sys.byteorder)
        for key, tensor in enumerate(tensors):
            _write_values(archive, f"data/{key}", tensor)
        archive.writestr(_entry("version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    """An archive entry without the time of day and the system, so that equal tensors make equal files."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.create_system = 3  # the same on every system
    return entry


def _write_values(archive: zipfile.ZipFile, name: str, tensor: StreamedTensor) -> None:
    written = 0
    with archive.open(_entry(name), "w", force_zip64=True) as entry:
        for piece in tensor.pieces:
            written += piece.numel()
            entry.write(piece.to(tensor.dtype).contiguous().numpy().data)
    if written != math.prod(tensor.shape):
        raise ValueError(f"{written} values for a tensor of shape {tensor.shape}")
