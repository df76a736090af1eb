"""One progress bar over the cells of several notebooks, each of which runs in a process of its own."""

from __future__ import annotations

import os
import time

from tqdm import tqdm

_VARIABLE = "FOCUSLIB_PROGRESS"  # cells done, cells in all, start in seconds since 1970
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"
_PAUSE = 0.5  # seconds between two texts on the bar


def announce(done: int, total: int, start: float) -> None:
    """Tell processes started from here that `done` of `total` cells are done; start: time.time() of the first."""
    os.environ[_VARIABLE] = f"{done},{total},{start}"


class Bar:
    """A bar over an experiment's cells: over those of all notebooks where `announce` was called, else over these."""

    def __init__(self, count: int, experiment: str):
        text = os.environ.get(_VARIABLE)
        self.known = text is not None
        self.done, self.total, self.start = (float(part) for part in (text or f"0,{count},{time.time()}").split(","))
        self.count, self.said = count, 0.0
        self.bar = tqdm(total=int(self.total), initial=int(self.done), desc=experiment, bar_format=_FORMAT)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.known:
            announce(int(min(self.done + self.count, self.total)), int(self.total), self.start)

    def step(self) -> None:
        """A cell is settled."""
        settled = self.bar.n + 1 - self.done
        self.bar.set_postfix_str(_times(time.time() - self.start, (self.done + settled) / self.total), refresh=False)
        self.bar.update(min(1, self.total - self.bar.n))

    def due(self) -> bool:
        """Whether it is time for another text."""
        return time.time() - self.said > _PAUSE

    def say(self, text: str, share: float) -> None:
        """Show how far the cells are that are being run. share: of what is left of this experiment, 0 … 1."""
        self.said = time.time()
        within = (self.done + share * self.count) / self.total
        self.bar.set_postfix_str(f"{text}, {_times(time.time() - self.start, within)}")


def _times(passed: float, share: float) -> str:
    """Minutes gone, and left if the rest goes on as fast as everything before."""
    left = passed / share - passed if 0 < share < 1 else 0
    return f"{passed / 60:.0f} min, about {max(left, 0) / 60:.0f} min left"
