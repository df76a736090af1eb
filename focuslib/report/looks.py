"""What each method drops of some clips, beside what it answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from focuslib.evaluation.left import unpack_left
from focuslib.experiments.curves import CurvePoint, nearest_points
from focuslib.experiments.store import CellResult, Outcome
from focuslib.explore.view import ViewData
from focuslib.report.figures import kept_rows_figure

SIDE = 0.55  # inches of a frame: there is a row a method


def looks_figures(outcome: Outcome, points: list[CurvePoint], near: float) -> Iterator[Figure]:
    """A figure a clip: a row a curve with its answer, a column a frame; tokens that are gone at the end are dimmed.

    Of each curve the point whose counted sparsity is nearest to `near` (percent). Tokens that a method merges or shares
    count as kept as long as they reach the last layer. Clips whose frames are not known are left out.
    """
    chosen = nearest_points(points, outcome.results, near)
    for result in outcome.results:
        cell = result.cell
        if cell.kind != "view" or not result.view:
            continue
        samples = {
            curve: sample
            for (curve, model, dataset), (_, answers) in chosen.items()
            if (model, dataset) == (cell.model, cell.dataset) and (sample := _sample(answers, cell.sample))
        }
        view = ViewData.load(outcome.folder / "cells" / result.view)
        if samples and view.frames is not None:
            rows = {_label(curve, sample): _left(sample) for curve, sample in samples.items()}
            yield kept_rows_figure(view.frames, view.layout, rows, _title(view, next(iter(samples.values()))), SIDE)


def _sample(result: CellResult, number: int | None) -> dict:
    """What is known of an answered question of the first task; nothing if it was not."""
    first = result.samples[0]["task"] if result.samples else None
    return next((s for s in result.answered if s["doc_id"] == number and s["task"] == first), {})


def _label(curve: str, sample: dict) -> str:
    return f"{curve}: {sample['answer']}{' ✓' if sample['score'] > 0.5 else ' ✗'}"


def _left(sample: dict) -> np.ndarray:
    """The tokens that reach the last layer."""
    tokens = sample["visual_tokens"]
    return unpack_left(sample["left"], tokens) if "left" in sample else np.arange(tokens)


def _title(view: ViewData, sample: dict) -> str:
    """The question with its options, but not how to answer it; the right answer, and dense's."""
    first, *rest = view.question.splitlines()
    words = " ".join([first, *(line for line in rest if re.match(r"\(?[A-Z][.):]", line))])
    right = f"; right: {sample['target']}" if "target" in sample else ""
    kind = f"{sample['question_type']}: " if "question_type" in sample else ""
    return f"{kind}{words}{right}; dense: {view.answers.get('dense', '')}"
