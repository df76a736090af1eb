"""An append-only file of answered requests, so that a killed run loses at most the request in progress."""

import json
import os
from pathlib import Path
from typing import Any


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


def lasting(entry: dict[str, Any]) -> bool:
    """Whether an entry holds for good; a question whose media could not be read is asked again."""
    return "error" not in entry or "final" in entry
