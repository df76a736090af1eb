"""What the paper's experiments cost on its GPU, shared out among cells and questions."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.sources import sources
from focuslib.experiments.cell import Cell
from focuslib.experiments.params import Count
from focuslib.paths import params_folder, read_yaml
from focuslib.validation import Strict, validate

PUBLISHED_GPU_GB = 80  # the paper's hours and settings are of such a card


class PublishedCost(Strict):
    """Hours by method, in full precision and in 8 bit, and of other experiments; questions by data set."""

    hours: dict[str, float]
    int8_hours: dict[str, float]
    others: dict[str, float]
    questions: dict[str, Count]


def published_cost() -> dict[str, Any]:
    """What params/published/cost.yaml says. Raises UserError for a mistake in it."""
    path = params_folder() / "published" / "cost.yaml"
    return validate(PublishedCost, read_yaml(path), str(path), "table")


def published_hours(cell: Cell) -> float | None:
    """Hours of the questions of an accuracy cell; None: not published."""
    asked = published_questions(cell)
    seconds = seconds_a_question(cell)
    if cell.kind != "accuracy" or asked is None or seconds is None:
        return None
    return seconds * asked / 3600


def published_questions(cell: Cell) -> int | None:
    """How many questions a cell asks, without its data; None: not published."""
    asked = _costs().questions.get(cell.dataset)
    if asked is None or cell.limit is None:
        return asked
    return min(asked, cell.limit * len(list(sources(DATASETS[cell.dataset]))))


def seconds_a_question(cell: Cell) -> float | None:
    """Seconds of a question of a cell, whatever its kind; None: not published."""
    costs = _costs()
    tokens = costs.lengths.get((cell.model, cell.dataset))
    hours = costs.hours.get(cell.quantization, {}).get(cell.method)
    return None if tokens is None or hours is None else hours * 3600 * tokens / costs.tokens


def _costs() -> _Costs:
    return _read(params_folder() / "published")


@lru_cache(maxsize=2)  # every cell asks
def _read(folder: Path) -> _Costs:
    return _Costs(folder)


class _Costs:
    """The paper's hours, which its (model, video data set) pairs share by questions and visual tokens."""

    def __init__(self, folder: Path):
        published = published_cost()
        self.hours = {None: published["hours"], "int8": published["int8_hours"]}
        self.questions: dict[str, int] = published["questions"]
        lengths = pd.read_csv(folder / "sequence_lengths.csv")
        lengths = lengths[lengths["dataset"].isin(self.questions)]
        self.lengths: dict[tuple[str, str], int] = lengths.set_index(["model", "dataset"])["sequence_length"].to_dict()
        self.tokens = sum(self.questions[dataset] * length for (_, dataset), length in self.lengths.items())
