"""Results on disk: one JSON file a cell, written atomically; all tables and figures are derived from these files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from focuslib.errors import UserError
from focuslib.evaluation.statistics import proportion_interval, score_interval
from focuslib.experiments.cell import Cell
from focuslib.files import write_json
from focuslib.paths import shown
from focuslib.prefill.trace import Trace


@dataclass
class CellResult:
    """A cell with what it gave (see evaluate.Evaluation).

    Trace cells also have the median sample's index and trace. Cost cells have `measured` (see single.measure_cost) and
    view cells a view instead of answers.
    """

    cell: Cell
    score: float | None
    samples: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    provenance: dict[str, Any]
    median_index: int | None = None
    trace: str | None = None  # file name of the native trace, beside the result
    view: str | None = None  # file name of what a view shows, beside the result
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The samples that were answered."""
        return [sample for sample in self.samples if "error" not in sample]

    def score_interval(self) -> tuple[float, float]:
        """95 % interval of `score`, in its own unit: of a mean over tasks and categories where it is one."""
        groups: dict[tuple, list[float]] = {}
        for sample in self.samples:
            groups.setdefault((sample["task"], sample.get("category")), []).append(sample["score"])
        mean = float(np.mean([np.mean(group) for group in groups.values()]))
        if not mean or self.score is None:
            return 0.0, 100 * proportion_interval(0, len(self.samples))[1]
        # a category without questions counts as 0 in some scores, and some have another unit
        low, high = score_interval(list(groups.values()))
        return low * self.score / mean, high * self.score / mean

    @property
    def unreadable(self) -> bool:
        """Whether there are questions that another run may answer: their media could not be read in this one."""
        return any(not failure.get("final") for failure in self.failures)


def paired_scores(base: CellResult, other: CellResult) -> tuple[list[float], list[float]]:
    """The scores of two cells on the questions both answered, in one order: [N] each."""
    known = {(s["task"], s["doc_id"]): s["score"] for s in base.answered}
    pairs = [(known[key], s["score"]) for s in other.answered if (key := (s["task"], s["doc_id"])) in known]
    return [a for a, _ in pairs], [b for _, b in pairs]


@dataclass
class Outcome:
    """What running an experiment's cells gave. failed: cell → one line that says why. refused: one line a worker."""

    folder: Path
    results: list[CellResult] = field(default_factory=list)
    ran: int = 0
    failed: dict[Cell, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every cell has a result in which every question could be read."""
        return not self.failed and not any(result.unreadable for result in self.results)

    def result(self, cell: Cell) -> CellResult | None:
        """What a cell gave; None if it failed."""
        return next((result for result in self.results if result.cell == cell), None)

    def add(self, further: Outcome) -> None:
        """Take in what running further cells gave."""
        self.results += further.results
        self.ran += further.ran
        self.failed |= further.failed
        self.refused += further.refused

    def summary(self) -> str:
        """One line on what ran, was resumed and failed, then a line a failure."""
        resumed = len(self.results) - self.ran
        lines = [f"{self.ran} cells run, {resumed} resumed, {len(self.failed)} failed; results in {shown(self.folder)}"]
        lines += [f"refused: {why}" for why in dict.fromkeys(self.refused)]
        lines += [f"failed: {cell}: {why}" for cell, why in self.failed.items()]
        for result in self.results:
            for failure in result.failures:
                what = "not possible" if failure.get("final") else "unreadable"
                lines.append(f"{what}: {result.cell}: {failure['task']} {failure['doc_id']}: {failure['error']}")
        return "\n".join(lines)


def result_file(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name()}.json"


def work_folder(result: Path) -> Path:
    """What a cell keeps until it has its result: answers, and the traces of all its samples."""
    return result.parent.parent / "work" / result.stem


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep a cell from being run by two processes at once. Raises UserError if another has it."""
    # not in the cell's work folder: a lock file that is deleted while it is held locks nothing
    file = path.parent.parent / "locks" / path.stem
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, blocking=False)
    try:
        if lock.is_locked:  # lmms-eval has filelock give a process one lock a file, which it may then take twice
            raise Timeout(str(file))
        with lock:
            yield
    except Timeout:
        raise UserError("another process is running it; run again when that has ended") from None


def write_status(folder: Path, experiment: str, results: list[CellResult], complete: bool, text: str) -> None:
    """Note which results an experiment has, whether all are there, and what its run said."""
    names = [f"{result.cell.name()}.json" for result in results]
    status = {"cells": names, "complete": complete, "text": text, "time": time.time()}
    write_json(folder / "cells" / f"{experiment}.index", status)


def read_status(folder: Path, experiment: str) -> dict[str, Any]:
    """What the latest run of an experiment said: complete (bool), text, and time (seconds since 1970)."""
    return json.loads((folder / "cells" / f"{experiment}.index").read_text())


def read_result(path: Path) -> CellResult:
    """A cell's result file."""
    value = json.loads(path.read_text())
    return CellResult(Cell(**value.pop("cell")), **value)


def collect(folder: Path, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[CellResult]:
    """The results of the experiments run in a results folder, each cell once, those of the latest run first.

    only, skip: names of experiments to take or leave out.
    """
    found = [path for path in (folder / "cells").glob("*.index") if path.stem not in skip]
    indices = [json.loads(path.read_text()) for path in found if not only or path.stem in only]
    indices.sort(key=lambda index: index.get("time", 0), reverse=True)
    names = [name for index in indices for name in index["cells"]]
    paths = [folder / "cells" / name for name in dict.fromkeys(names)]
    return [read_result(path) for path in paths if path.exists()]


def export_traces(outcome: Outcome, targets: Iterable[tuple[Cell, Path]]) -> None:
    """Write the simulator's .pth of each trace cell that has a result, where it is missing or of another trace."""
    sources = outcome.folder / "cells" / "traces.exported"
    known = json.loads(sources.read_text()) if sources.exists() else {}
    for cell, path in targets:
        result = outcome.result(cell)
        if result is None or result.trace is None:
            continue
        native = outcome.folder / "cells" / result.trace
        content = sha256(native.read_bytes()).hexdigest()
        if known.get(str(path)) != content or not path.exists():
            Trace.load(native).save_pth(path)
            known[str(path)] = content
            write_json(sources, known)


def pth_name(cell: Cell) -> str:
    """The file name of a cell's trace for the simulator."""
    return f"{cell.model}_{cell.dataset}.pth"
