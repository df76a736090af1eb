"""An append-only file of answered requests, so that a killed run loses at most the request in progress."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """A short stable name of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """One JSON object a line, synced to disk before `add` returns. A line cut off by a crash is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.entries[entry["key"]] = entry
                whole += len(line)
            os.truncate(path, whole)
        self._file = path.open("ab")

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Store an entry for good."""
        entry = {"key": key, **entry}
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries[key] = entry

    def close(self) -> None:
        """Close the file; the entries stay readable."""
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader sees the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
