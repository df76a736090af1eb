"""Write what torch.save would, one piece of a tensor after another, so that no tensor has to be in memory whole.

The format is torch's own: a ZIP archive of stored entries, a pickle that describes the tensors, and one entry of raw
values a tensor. `torch.load(path, weights_only=True)` reads it.
"""

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {torch.bool: torch.BoolStorage, torch.int32: torch.IntStorage}


@dataclass
class StreamedTensor:
    """A tensor to be written: its shape, its dtype (bool or int32) and its values as tensors, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


class _Storage:
    def __init__(self, key: str, tensor: StreamedTensor):
        self.key, self.tensor = key, tensor


class _Reference:
    """Pickles as a tensor over a storage."""

    def __init__(self, storage: _Storage):
        self.storage = storage

    def __reduce__(self):
        shape = self.storage.tensor.shape
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        return ("storage", _STORAGES[tensor.dtype], value.key, "cpu", math.prod(tensor.shape))


def save_streamed(value: dict[str, dict[str, StreamedTensor]], path: Path) -> None:
    """Write a dictionary of dictionaries of tensors; memory holds one piece at a time.

    Raises ValueError if the pieces of a tensor are not exactly its values.
    """
    storages: list[_Storage] = []

    def reference(tensor: StreamedTensor) -> _Reference:
        storages.append(_Storage(str(len(storages)), tensor))
        return _Reference(storages[-1])

    described = {outer: {name: reference(tensor) for name, tensor in inner.items()} for outer, inner in value.items()}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(described)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), buffer.getvalue())
        archive.writestr(_entry("byteorder"), sys.byteorder)
        for storage in storages:
            _write_entry(archive, storage)
        archive.writestr(_entry("version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    """An archive entry without the time of day, so that equal tensors make equal files."""
    return zipfile.ZipInfo(f"archive/{name}")


def _write_entry(archive: zipfile.ZipFile, storage: _Storage) -> None:
    tensor, written = storage.tensor, 0
    with archive.open(_entry(f"data/{storage.key}"), "w", force_zip64=True) as entry:
        for piece in tensor.pieces:
            written += piece.numel()
            entry.write(piece.to(tensor.dtype).contiguous().numpy().data)
    if written != math.prod(tensor.shape):
        raise ValueError(f"{written} values for a tensor of shape {tensor.shape}")
