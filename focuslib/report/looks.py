"""What each method drops of some clips, beside what it answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from focuslib.experiments.cell import Cell
from focuslib.experiments.curves import CurvePoint
from focuslib.experiments.store import CellResult, Outcome
from focuslib.explore.view import ViewData
from focuslib.report.figures import kept_rows_figure

SIDE = 0.55  # inches of a frame: there is a row a method


def looks_figures(outcome: Outcome, points: list[CurvePoint]) -> Iterator[Figure]:
    """A figure a clip: a row a curve with its answer, a column a frame; tokens that are gone at the end are dimmed.

    Tokens that a method merges or shares count as kept as long as they reach the last layer. Clips whose frames are not
    known are left out.
    """
    curves = {_view_of(point.cell, None): point for point in points}
    answers = {result.cell: result for result in outcome.results if result.cell.kind == "accuracy"}
    clips: dict[int, list[tuple[CurvePoint, CellResult]]] = {}
    for result in outcome.results:
        point = curves.get(_view_of(result.cell, None)) if result.view else None
        if point is not None and result.cell.sample is not None:
            clips.setdefault(result.cell.sample, []).append((point, result))
    for number, shown in clips.items():
        views = {point: ViewData.load(outcome.folder / "cells" / str(result.view)) for point, result in shown}
        samples = {point: _sample(answers.get(point.cell), number) for point in views}
        rows = {_label(point, view, samples[point]): _kept(view) for point, view in views.items()}
        first = next(iter(views))
        view, sample = views[first], samples[first]
        if view.frames is not None:
            yield kept_rows_figure(view.frames, view.layout, rows, _title(view, sample), SIDE)


def _view_of(cell: Cell, sample: int | None) -> Cell:
    return replace(cell, kind="view", limit=1, sample=sample)


def _sample(result: CellResult | None, number: int) -> dict:
    """What is known of a question of the first task."""
    samples = result.samples if result else []
    return next((s for s in samples if s["doc_id"] == number and s["task"] == samples[0]["task"]), {})


def _label(point: CurvePoint, view: ViewData, sample: dict) -> str:
    mark = {True: " ✓", False: " ✗"}[sample["score"] > 0.5] if "score" in sample else ""
    return f"{point.curve}: {view.answers[point.cell.method]}{mark}"


def _kept(view: ViewData) -> np.ndarray:
    """The tokens that reach the last layer."""
    return np.asarray(list(view.kept.values())[-1]) if view.kept else np.arange(len(view.layout.frame))


def _title(view: ViewData, sample: dict) -> str:
    """The question with its options, but not how to answer it; the right answer, and dense's."""
    first, *rest = view.question.splitlines()
    words = " ".join([first, *(line for line in rest if re.match(r"\(?[A-Z][.):]", line))])
    right = f"; right: {sample['target']}" if "target" in sample else ""
    kind = f"{sample['question_type']}: " if "question_type" in sample else ""
    return f"{kind}{words}{right}; dense: {view.answers.get('dense', '')}"
