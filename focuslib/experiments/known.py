"""Answers that another cell has: of a limit that grew, or of a comparison or a trace of the same questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from focuslib.errors import UserError
from focuslib.evaluation.evaluate import entry_of
from focuslib.experiments.cell import Cell
from focuslib.experiments.shards import Question
from focuslib.experiments.store import read_result, result_file

SHARING = ("accuracy", "matched", "ablation", "sparsity", "blank")  # kinds of cells whose answers are all they give
GIVING = (*SHARING, "trace")  # those of use to others: a trace is of a run of its own, its answers are as any


class Known:
    """The answers in a results folder, as of what it holds when it is asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._cells: dict[Path, Cell | None] = {}  # result files that were looked at; None: of no use

    def answers(self, cell: Cell) -> dict[Question, dict[str, Any]]:
        """Question → entry of its answer, of those that a cell's model, method and settings gave before."""
        found: dict[Question, dict[str, Any]] = {}
        if cell.kind not in SHARING:
            return found
        for path in (self.folder / "cells").glob(f"*_{cell.model}_{cell.dataset}_{cell.method}_*.json"):
            if path not in self._cells:
                self._cells[path] = self._current(path)
            other = self._cells[path]
            if other is not None and gives(other, cell):
                for sample in read_result(path).answered:
                    found[sample["task"], sample["doc_id"]] = entry_of(sample)
        return found

    def _current(self, path: Path) -> Cell | None:
        """The cell of a result file, if a result of now would have its name: of the same sources, weights and data."""
        if not path.name.startswith(tuple(f"{kind}_" for kind in GIVING)):
            return None
        try:
            cell = read_result(path).cell
            return cell if result_file(cell, self.folder) == path else None
        except (UserError, OSError, ValueError, KeyError, TypeError):  # of another version, or its checkpoint is gone
            return None


def gives(other: Cell, cell: Cell) -> bool:
    """Whether one cell's answers are of use to another: it asks the same model, under the same method."""
    return other.kind in GIVING and cell.kind in SHARING and _asks(other) == _asks(cell)


def _asks(cell: Cell) -> Cell:
    """What decides an answer: a cell without how many questions it asks, and what for."""
    return replace(cell, kind="blank" if cell.kind == "blank" else "", limit=None, sample=None)
