"""What the paper's experiments cost on its GPU, shared out among cells and questions."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.sources import sources
from focuslib.experiments.cell import Cell
from focuslib.experiments.params import Count
from focuslib.models import HfVLM
from focuslib.models.media import Clip
from focuslib.models.registry import adapter_of
from focuslib.paths import params_folder, read_yaml
from focuslib.validation import Strict, validate

PUBLISHED_GPU_GB = 80  # the paper's hours and settings are of such a card
TYPICAL, LONG, RATE = (360, 640), 15000, 25.0  # pixels, frames and rate of a video whose tokens are counted
UNKNOWN = 500  # questions of a data set whose number is not known


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
    """Seconds of a question of a cell, whatever its kind; None: not published.

    Of a model that the paper did not ask: by the visual tokens of a long video.
    """
    costs = _costs()
    hours = costs.hours.get(cell.quantization, {}).get(cell.method)
    tokens = costs.lengths.get((cell.model, cell.dataset))
    if tokens is None and cell.dataset in costs.questions and adapter_of(cell.model) is HfVLM:
        tokens = video_tokens(str(cell.checkpoint), cell.frames, cell.fps)
    return None if tokens is None or hours is None else hours * 3600 * tokens / costs.tokens


def expected_work(cell: Cell) -> float:
    """About how much work a cell is, without its data: seconds where they are published, else its questions."""
    one = seconds_a_question(cell) or 1.0
    if cell.looks:
        return one
    return one * (published_questions(cell) or cell.limit or UNKNOWN)


def is_published(cell: Cell) -> bool:
    """Whether the paper asked these questions of this model."""
    return (cell.model, cell.dataset) in _costs().lengths


@cache
def video_tokens(checkpoint: str, frames: int | None, fps: float | None) -> int | None:
    """Visual tokens of a long video by a checkpoint's own processor; None if it is not on this disk."""
    try:
        vlm = HfVLM.without_weights(checkpoint, frames=frames, fps=fps)
        count = len(vlm.sampling.indices(LONG, RATE))
        clip = Clip(np.zeros((count, *TYPICAL, 3), np.uint8), tuple(np.linspace(0, LONG / RATE, count)), LONG / RATE)
        grid = vlm.prepare(clip, "").grid
    except UserError:
        return None
    return None if grid is None else grid.length


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
