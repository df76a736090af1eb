"""The identity of a checkpoint: a digest of its content."""

import json
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from focuslib.files import digest, write_json
from focuslib.paths import cache_folder

LARGE = 64 << 20  # bytes, from which a file's digest is kept on disk between runs


def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint folder: the name and content of every file in it."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    return digest([[file.name, _content(file.resolve())] for file in files])


def _content(file: Path) -> str:
    """The SHA-256 of a file, computed once for as long as its size, times and inode stay the same.

    A file of the hub's cache is a link to a blob that the hub has named by it.
    """
    if file.parent.name == "blobs" and len(file.name) == 64:
        return file.name
    status = file.stat()
    return _digest_of(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(4096)
def _digest_of(file: Path, size: int, *times: int) -> str:
    if size < LARGE:
        return sha256(file.read_bytes()).hexdigest()
    known = cache_folder("digests") / f"{digest([str(file), size, *times])}.json"
    try:
        return json.loads(known.read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        found = sha256()
        with file.open("rb") as opened:
            while piece := opened.read(1 << 24):
                found.update(piece)
        with suppress(OSError):  # it can be computed again
            write_json(known, {"file": str(file), "sha256": found.hexdigest()})
        return found.hexdigest()
