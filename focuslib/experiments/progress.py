"""One progress bar over the cells of several notebooks, each of which runs in a process of its own."""

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_VARIABLE = "FOCUSLIB_PROGRESS"  # cells done, cells in all, start in seconds since 1970
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"


def announce(done: int, total: int, start: float) -> None:
    """Tell processes started from here that `done` of `total` cells are done; start: time.time() of the first."""
    os.environ[_VARIABLE] = f"{done},{total},{start}"


def over_cells(settled: Iterable[T], count: int, experiment: str) -> Iterator[T]:
    """Pass on `count` settled cells, with a bar: of all notebooks where `announce` was called, else of these."""
    if _VARIABLE not in os.environ:
        yield from tqdm(settled, total=count, desc=experiment, unit="cell")
        return
    done, total, start = (float(part) for part in os.environ[_VARIABLE].split(","))
    with tqdm(total=int(total), initial=int(done), desc=experiment, bar_format=_FORMAT) as bar:
        for number, cell in enumerate(settled, 1):
            yield cell
            bar.set_postfix_str(_times(time.time() - start, (done + number) / total), refresh=False)
            bar.update(min(1, total - bar.n))
    announce(int(min(done + count, total)), int(total), start)


def _times(passed: float, share: float) -> str:
    """Minutes gone, and left if the rest goes on as fast as everything before."""
    left = passed / share - passed if 0 < share < 1 else 0
    return f"{passed / 60:.0f} min, about {max(left, 0) / 60:.0f} min left"
