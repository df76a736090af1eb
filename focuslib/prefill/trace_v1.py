"""Reads the first format of native traces, which is no longer written, so that old results still open.

the records: each a zlib stream of one site's codes in one layer, [S, V] uint8
the index: JSON; geometry, and offset, size and CRC-32 of each record
the end: the size of the index (8 bytes, little-endian) and MAGIC
"""

import json
import struct
import zlib
from typing import Any, BinaryIO

MAGIC = b"focustrace1\n"
_MAX_INDEX = 1 << 26


def is_v1(file: BinaryIO) -> bool:
    """Whether an open file ends as one of the first format does."""
    size = file.seek(0, 2)
    file.seek(max(0, size - len(MAGIC)))
    return file.read(len(MAGIC)) == MAGIC


class TraceFileV1:
    """An open file of the first format, as `trace_file.TraceFile` is one of the present format.

    index: as there; a layer's entry is its record, [offset, size, CRC-32].
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.end = file.seek(0, 2) - 8 - len(MAGIC)
        if self.end < 0:
            raise ValueError("it is too short")
        file.seek(self.end)
        (size,) = struct.unpack("<Q", file.read(8))
        if size > min(self.end, _MAX_INDEX):
            raise ValueError("its index is too large")
        file.seek(self.end - size)
        self.index: dict[str, Any] = json.loads(file.read(size))
        self.index["sites"] = self.index.pop("records")

    def read(self, site: str, layer: int, size: int) -> bytes:
        """A layer of a site: what was written, one byte more than `size` at most. Raises one of DAMAGE if it cannot."""
        offset, length, crc = self.index["sites"][site]["layers"][layer]
        if not 0 <= offset <= offset + length <= self.end:
            raise ValueError("a record outside the file")
        self.file.seek(offset)
        data = self.file.read(length)
        if zlib.crc32(data) != crc:
            raise ValueError(f"layer {layer} of {site} fails its check sum")
        stream = zlib.decompressobj()
        codes = stream.decompress(data, size + 1)
        if len(codes) == size and not stream.eof:
            raise ValueError(f"layer {layer} of {site} does not end")
        return codes
