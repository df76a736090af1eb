"""The cells of several experiments over one set of workers, so that none waits for the last cells of an experiment."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from focuslib.errors import UserError
from focuslib.experiments.cell import Cell
from focuslib.experiments.paper import further_cells, results_folder
from focuslib.experiments.progress import Bar
from focuslib.experiments.runner import Workers, settle
from focuslib.experiments.store import read_result, result_file


@dataclass
class Asked:
    """An experiment of which cells are to be run: its name, parameters, and first cells (see paper.plan).

    left: the cells that are not settled. ran: those that were run. whole: whether its further cells are known.
    """

    name: str
    params: dict[str, Any]
    cells: list[Cell]
    left: set[Cell] = field(default_factory=set)
    ran: set[Cell] = field(default_factory=set)
    whole: bool = False

    def __post_init__(self):
        self.left = set(self.cells)
        self.folder = results_folder(self.params["results"])
        self.workers = Workers.of(self.params)

    def further(self) -> list[Cell]:
        """The cells that are known now that the first ones are settled."""
        self.whole = True
        results = [read_result(path) for cell in self.cells if (path := _found(cell, self.folder))]
        return further_cells(self.name, self.params, results)


def ask(experiments: list[Asked], refused: list[str]) -> Iterator[Asked]:
    """Run the cells of experiments, in their order; each is given out once its last cell is settled.

    Those that share a results folder and workers go on from one to the next without a pause. Cells that are timed come
    first, while nothing else runs. What became of a cell its experiment's own run says (see paper.run).
    refused: takes one line a worker that was refused.
    Raises UserError if an answer cannot be kept.
    """
    with Bar(list(dict.fromkeys(chain(*(one.cells for one in experiments)))), "reproduce") as bar:
        groups: dict[tuple[Path, Workers], list[Asked]] = {}
        for one in experiments:
            groups.setdefault((one.folder, one.workers), []).append(one)
        for (folder, workers), group in groups.items():
            yield from _ask(group, folder, workers, bar, refused)


def _ask(group: list[Asked], folder: Path, workers: Workers, bar: Bar, refused: list[str]) -> Iterator[Asked]:
    """The same, of experiments that share a folder and workers."""
    cells = list(dict.fromkeys(chain(*(one.cells for one in group))))
    timed = [cell for cell in cells if cell.kind == "cost"]
    first = {cell: one for one in reversed(group) for cell in one.cells if cell.kind != "cost"}
    batches = deque([cell for cell in one.cells if first.get(cell) is one] for one in group)
    waiting = deque(group)

    def more() -> list[Cell]:
        while batches:
            if batch := batches.popleft():
                return batch
        return []

    costs = iter([timed])
    for cell, ran, _ in chain(
        settle(lambda: next(costs, []), folder, workers, bar, refused), settle(more, folder, workers, bar, refused)
    ):
        bar.step(cell, ran)
        for one in group:
            if cell in one.left:
                one.left.discard(cell)
                one.ran.update([cell] * ran)
        for one in [one for one in waiting if not one.left]:
            further = [] if one.whole else one.further()
            if further:
                bar.more(further)
                one.left.update(further)
                batches.appendleft(further)
            else:
                waiting.remove(one)
                yield one
    yield from waiting


def _found(cell: Cell, folder: Path) -> Path | None:
    """A cell's result file, if it is there."""
    try:
        path = result_file(cell, folder)
    except UserError:
        return None
    return path if path.exists() else None
