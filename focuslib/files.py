"""Small files, written whole or not at all, and short names of values."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """A short stable name of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader sees the old one or the whole new one."""
    with _whole(path, "w") as file:
        json.dump(value, file, indent=1)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with _whole(path, "wb") as file:
        file.write(content)


@contextmanager
def _whole(path: Path, mode: str) -> Iterator[Any]:
    """A file to write to, that is on disk and in its place at the end of the block, or nowhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write it at once
    try:
        with partial.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
