"""The progress bar over cells."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from focuslib.experiments.cell import Cell
from focuslib.experiments.published import expected_work

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"
_PAUSE = 0.5  # seconds between two texts on the bar
_DELAY = 3.0  # seconds before the bar is shown: not where all cells have their results


class Bar:
    """A bar over cells, of one experiment or of several.

    What is left is guessed from the work (see published.expected_work) that was done since the bar was made: cells that
    had their results took no time.
    """

    def __init__(self, cells: Sequence[Cell], name: str):
        self.whole, self.done, self.ran = sum(map(expected_work, cells)), 0.0, 0.0
        self.start, self.said = time.time(), 0.0
        self.bar = tqdm(total=len(cells), desc=name, bar_format=_FORMAT, delay=_DELAY)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def more(self, cells: Sequence[Cell]) -> None:
        """There are further cells, which were not known when the bar was made."""
        self.whole += sum(map(expected_work, cells))
        self.bar.total += len(cells)

    def found(self, work: float) -> None:
        """So much work of the cells that are to run was done by an earlier run, and takes no time in this one."""
        self.ran -= work

    def step(self, cell: Cell, ran: bool) -> None:
        """A cell is settled. ran: in this run, so that it took its time."""
        work = expected_work(cell)
        self.done += work
        self.ran += work * ran
        self.bar.set_postfix_str(self._times(0.0), refresh=False)
        self.bar.update()

    def due(self) -> bool:
        """Whether it is time for another text."""
        return time.time() - self.said > _PAUSE

    def say(self, text: str, under_way: float) -> None:
        """Show how far the cells are that are being run. under_way: the work done of those that are not settled."""
        self.said = time.time()
        self.bar.set_postfix_str(f"{text}, {self._times(under_way)}")

    def _times(self, under_way: float) -> str:
        """Minutes gone, and left if the rest goes on as fast as what was run."""
        gone, ran = time.time() - self.start, self.ran + under_way
        if ran <= 0 or self.bar.n == self.bar.total:
            return f"{gone / 60:.0f} min"
        left = gone / ran * max(self.whole - self.done - under_way, 0.0)
        return f"{gone / 60:.0f} min, about {left / 60:.0f} min left"
