"""The native trace file: a zip archive of one deflated entry a site and layer, and an index, which comes last.

    q_proj/000.u8 …   the codes of one site in one layer, [S, V] uint8
    index.json        format, dtype and geometry; each site's vectors, and the CRC-32 of each of its layers

zipfile checks that an entry is whole. That it is the right one is what the index says, and the index holds its own
CRC-32: whatever is changed in a file, a reader gets the codes that were written, or an error.
"""

import json
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

_FORMAT, _DTYPE, _INDEX = 2, "uint8", "index.json"
# What zipfile may read at once, a directory say, and the largest index: a thousand layers take a tenth of it.
_MAX_READ = 1 << 22

# What zipfile, zlib and json raise when they are given a damaged file.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError,
    OverflowError, RuntimeError, EOFError, OSError,
)  # fmt: skip


class TraceFile:
    """An open native file.

    index: "grid", "frame_block", "block", "max_doublings", and "sites": site → {"vectors", "layers": [CRC-32, …]}; its
    values are for the caller to check. Raises one of DAMAGE if the file is not whole.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.archive = zipfile.ZipFile(_ShortReads(file))
        self.index: dict[str, Any] = json.loads(self._read(_INDEX, _MAX_READ))
        if self.index.pop("crc32") != zlib.crc32(_text(self.index)):
            raise ValueError("its index fails its check sum")
        found = self.index.pop("format"), self.index.pop("dtype")
        if found != (_FORMAT, _DTYPE):
            raise ValueError(f"format {found[0]} of {found[1]}, written by another focuslib")

    def read(self, site: str, layer: int, size: int) -> bytes:
        """A layer of a site: what was written, one byte more than `size` at most. Raises one of DAMAGE if it cannot."""
        name = _entry_name(site, layer)
        if self.index["sites"][site]["layers"][layer] != self.archive.getinfo(name).CRC:
            raise ValueError(f"{name} is not the layer that was written")
        return self._read(name, size)

    def _read(self, name: str, size: int) -> bytes:
        if self.archive.getinfo(name).compress_type != zipfile.ZIP_DEFLATED:
            raise ValueError(f"{name} is not deflated")
        with self.archive.open(name) as entry:
            return entry.read(size + 1)  # up to the entry's end, where zipfile compares its check sum


def write_codes(archive: zipfile.ZipFile, site: str, layer: int, codes: bytes) -> int:
    """Add a layer of a site; its CRC-32, for the index."""
    return _write(archive, _entry_name(site, layer), codes)


def write_index(archive: zipfile.ZipFile, index: dict[str, Any]) -> None:
    """Add the index (see TraceFile), after which the archive can be closed."""
    index = {"format": _FORMAT, "dtype": _DTYPE, **index}
    _write(archive, _INDEX, _text({**index, "crc32": zlib.crc32(_text(index))}))


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> int:
    entry = zipfile.ZipInfo(name)  # without the time of day: equal traces make equal files
    entry.create_system = 3  # the same on every system
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 6)
    return entry.CRC


def _entry_name(site: str, layer: int) -> str:
    return f"{site}/{layer:03}.u8"


def _text(index: dict[str, Any]) -> bytes:
    return json.dumps(index, separators=(",", ":")).encode()


class _ShortReads:
    """A file of which zipfile gets a few megabytes at once: a damaged size must not take the memory it asks for."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int | None = -1) -> bytes:
        return self.file.read(_MAX_READ if size is None or size < 0 else min(size, _MAX_READ))
