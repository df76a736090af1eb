"""A folder that is built once, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def build_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, which `fill` fills now if it is not there yet.

    It is built beside its place and renamed, so a killed build leaves nothing that looks finished, and many processes
    may call this at once.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        fill(work)
        os.chmod(work, 0o755)  # mkdtemp makes it private
        try:
            work.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
