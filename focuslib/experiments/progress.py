"""One progress bar over the cells of several notebooks, each of which runs in a process of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

from tqdm import tqdm

from focuslib.experiments.cell import Cell
from focuslib.experiments.published import expected_work

# cells that are done, that will be after this notebook, and in all; the same of their work; the time of the start
_VARIABLE = "FOCUSLIB_PROGRESS"
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"
_PAUSE = 0.5  # seconds between two texts on the bar


def announce(done: Sequence[Cell], coming: Sequence[Cell], later: Sequence[Cell], start: float) -> None:
    """Tell a notebook's process which cells are done, its own, and those after. start: time.time() of the first."""
    parts = done, [*done, *coming], [*done, *coming, *later]
    _tell(*map(len, parts), *(sum(map(expected_work, part)) for part in parts), start)


def _tell(*numbers: float) -> None:
    os.environ[_VARIABLE] = json.dumps(numbers)


class Bar:
    """A bar over an experiment's cells: over those of all notebooks where `announce` was called, else over these.

    What is left is guessed from the work (see published.expected_work) that was done since the bar was made: cells that
    had their results took no time. Cells that a notebook runs beyond those announced move nothing.
    """

    def __init__(self, cells: Sequence[Cell], experiment: str):
        text = os.environ.get(_VARIABLE)
        self.known = text is not None
        work = sum(map(expected_work, cells))
        done, self.until, self.total, self.done, self.work, self.whole, self.start = (
            json.loads(text) if text else (0, len(cells), len(cells), 0.0, work, work, time.time())
        )
        self.made, self.ran, self.said = time.time(), 0.0, 0.0
        self.bar = tqdm(total=self.total, initial=done, desc=experiment, bar_format=_FORMAT)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.known:
            _tell(self.bar.n, self.until, self.total, self.done, self.work, self.whole, self.start)

    def found(self, work: float) -> None:
        """So much work of the cells that are to run was done by an earlier run, and takes no time in this one."""
        self.ran -= work

    def step(self, cell: Cell, ran: bool) -> None:
        """A cell is settled. ran: in this run, so that it took its time."""
        work = expected_work(cell)
        self.done = min(self.done + work, self.work)
        self.ran += work * ran
        self.bar.set_postfix_str(self._times(0.0), refresh=False)
        self.bar.update(min(1, self.until - self.bar.n))

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
        if ran <= 0 or self.bar.n == self.until:
            return gone
        left = (now - self.made) / ran * max(self.whole - self.done - under_way, 0.0)
        return f"{gone}, about {left / 60:.0f} min left"
