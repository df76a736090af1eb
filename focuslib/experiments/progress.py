"""One progress bar over the cells of several notebooks, each of which runs in a process of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

from tqdm import tqdm

from focuslib.experiments.cell import Cell
from focuslib.experiments.published import expected_work

_VARIABLE = "FOCUSLIB_PROGRESS"  # cells done, cells in all, the work of both, start in seconds since 1970
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"
_PAUSE = 0.5  # seconds between two texts on the bar


def announce(done: Sequence[Cell], cells: Sequence[Cell], start: float) -> None:
    """Tell processes started from here which of all cells are done; start: time.time() of the first."""
    _tell(len(done), len(cells), sum(map(expected_work, done)), sum(map(expected_work, cells)), start)


def _tell(*numbers: float) -> None:
    os.environ[_VARIABLE] = json.dumps(numbers)


class Bar:
    """A bar over an experiment's cells: over those of all notebooks where `announce` was called, else over these.

    What is left is guessed from the work (see published.expected_work) that was done since the bar was made: cells that
    had their results took no time.
    """

    def __init__(self, cells: Sequence[Cell], experiment: str):
        text = os.environ.get(_VARIABLE)
        self.known = text is not None
        work = sum(map(expected_work, cells))
        done, self.total, self.done, self.whole, self.start = (
            json.loads(text) if text else (0, len(cells), 0.0, work, time.time())
        )
        self.made, self.ran, self.said = time.time(), 0.0, 0.0
        self.bar = tqdm(total=self.total, initial=done, desc=experiment, bar_format=_FORMAT)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.known:
            _tell(self.bar.n, self.total, self.done, self.whole, self.start)

    def step(self, cell: Cell, ran: bool) -> None:
        """A cell is settled. ran: in this run, so that it took its time."""
        work = expected_work(cell)
        self.done += work
        self.ran += work * ran
        self.bar.set_postfix_str(self._times(0.0), refresh=False)
        self.bar.update(min(1, self.total - self.bar.n))

    def due(self) -> bool:
        """Whether it is time for another text."""
        return time.time() - self.said > _PAUSE

    def say(self, text: str, under_way: float) -> None:
        """Show how far the cells are that are being run. under_way: the work done of those that are not settled."""
        self.said = time.time()
        self.bar.set_postfix_str(f"{text}, {self._times(under_way)}")

    def _times(self, under_way: float) -> str:
        """Minutes gone, and left if the rest goes on as fast as what was run since the bar was made."""
        now, ran = time.time(), self.ran + under_way
        gone = f"{(now - self.start) / 60:.0f} min"
        if not ran:
            return gone
        left = (now - self.made) / ran * max(self.whole - self.done - under_way, 0.0)
        return f"{gone}, about {left / 60:.0f} min left"
