"""Shards: the questions of a cell in pieces, each of which a worker answers by itself."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import whole_groups
from focuslib.experiments.cell import Cell
from focuslib.models.base import Needs
from focuslib.models.registry import adapter_of

SECONDS = 300  # that a shard is expected to take; a model that must be loaded first takes a minute or two
QUESTIONS = 20  # of a shard of which no time is known

Question = tuple[str, int]  # task, number
# what a worker that holds a model has loaded
Model = tuple[str, str | None, str, str, str | None, int | None, float | None]


@dataclass(frozen=True, eq=False)
class Shard:
    """A piece of a cell that a worker is given; each is its own, whatever it holds.

    number, count: which one of how many. questions: none for a cell about one question, which the worker finds.
    identity: the cell's, as the driver sees it. seconds: that a question is expected to take; None: not known.
    """

    cell: Cell
    number: int
    count: int
    questions: tuple[Question, ...] = ()
    identity: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    def __str__(self) -> str:
        if not self.questions:
            return f"shard {self.number} of {self.count}"
        first, last = (f"{task} {number}" for task, number in (self.questions[0], self.questions[-1]))
        return f"shard {self.number} of {self.count} ({first if first == last else f'{first} to {last}'})"

    @property
    def model(self) -> Model:
        """What must be loaded for it."""
        return model_of(self.cell)

    @property
    def expected(self) -> float:
        """Seconds that it may take, for want of better one a question."""
        return max(1, len(self.questions)) * (self.seconds or 1)


def model_of(cell: Cell) -> Model:
    """What a cell has loaded: model, checkpoint, device, dtype, quantization, frames and their rate."""
    return cell.model, cell.checkpoint, cell.device, cell.dtype, cell.quantization, cell.frames, cell.fps


def needs_of(model: Model) -> Needs:
    """What a worker that holds the model takes of a machine."""
    name, _, device, *_ = model
    needs = adapter_of(name).needs
    return needs if device.startswith("cuda") else Needs(0, needs.memory_gb)


def questions_of(cell: Cell) -> list[Question]:
    """All questions that a cell asks, in lmms-eval's order. Imports lmms-eval, which takes ten seconds."""
    from focuslib.evaluation.lmms import requests

    dataset = DATASETS[cell.dataset]
    asked = requests(dataset, cell.model, whole_groups(cell.limit, dataset))
    return [(request.args[4], request.args[3]) for request in asked]


def split(
    cell: Cell, questions: list[Question], answered: Collection[Question], size: int | None, seconds: float | None,
    identity: dict[str, Any],
) -> list[Shard]:  # fmt: skip
    """The shards of a cell that have a question left.

    Where a shard begins depends on the size alone, so that they are the same ones in a run that goes on. Questions that
    are scored together are in one shard, and the questions of two tasks are not. Of several the last is taken apart, so
    that workers end at about the same time.
    size: questions a shard; None: about SECONDS of the expected seconds a question, or QUESTIONS.
    """
    together = DATASETS[cell.dataset].together
    size = max(1, round((size or shard_size(seconds)) / together)) * together
    blocks = []
    for _, group in groupby(questions, lambda question: question[0]):
        task = list(group)
        blocks += [task[start : start + size] for start in range(0, len(task), size)]
    if len(blocks) > 1:
        blocks[-1:] = _taken_apart(blocks[-1], together)
    left = [tuple(question for question in block if question not in answered) for block in blocks]
    return [Shard(cell, number, len(blocks), block, identity, seconds) for number, block in enumerate(left, 1) if block]


def _taken_apart(block: list[Question], together: int) -> list[list[Question]]:
    """About a half and two quarters of a block."""
    quarter = len(block) // (4 * together) * together
    pieces = [block[: len(block) - 2 * quarter], block[len(block) - 2 * quarter : len(block) - quarter]]
    return [*pieces, block[len(block) - quarter :]] if quarter else [block]


def shard_size(seconds: float | None) -> int:
    """Questions a shard of which each takes so many seconds."""
    return max(1, int(SECONDS / seconds)) if seconds else QUESTIONS
