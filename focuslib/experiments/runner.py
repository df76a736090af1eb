"""Run cells: those that have no result yet, each resumed where it was stopped; in this process or over workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import evaluate
from focuslib.evaluation.sources import require
from focuslib.experiments.cell import Cell
from focuslib.experiments.engine import Engine
from focuslib.experiments.finish import (
    Settled,
    choose_trace,
    describe_run,
    one_line,
    resume,
    trace_file,
    unsettled,
    write_result,
)
from focuslib.experiments.known import Known
from focuslib.experiments.local import LocalEngine
from focuslib.experiments.progress import Bar
from focuslib.experiments.shards import Question
from focuslib.experiments.single import measure_cost, record_view
from focuslib.experiments.spread import spread
from focuslib.experiments.store import (
    Outcome,
    claimed,
    export_traces,
    pth_name,
    read_result,
    result_file,
    work_folder,
    write_status,
)
from focuslib.experiments.worker import Loader
from focuslib.experiments.worker import load_cell as load_cell
from focuslib.methods.settings import make_method
from focuslib.models import VLM


@dataclass(frozen=True)
class Workers:
    """What shares the cells.

    count: processes, or Ray workers; with the device "cuda", each takes a GPU. engine: "local" (this machine) or "ray".
    address: of a running Ray cluster, "auto" for the one this machine is in; None makes one of this machine.
    shard: questions a shard, None as shards.split has it.
    """

    count: int = 1
    engine: str = "local"
    address: str | None = None
    shard: int | None = None

    @classmethod
    def of(cls, params: dict[str, Any]) -> Workers:
        """As an experiment's parameters say."""
        return cls(params["workers"], params["engine"], params["address"], params["shard"])

    def open(self) -> Engine | None:
        """The engine, not yet entered; None: the cells are run in this process."""
        if self.engine == "ray":
            from focuslib.experiments.cluster import RayEngine

            return RayEngine(self.count, self.address)
        return LocalEngine(self.count) if self.count > 1 else None


def run_cells(
    experiment: str,
    cells: Iterable[Cell],
    folder: Path,
    trace_folder: Path | None = None,
    workers: int | Workers = 1,
) -> Outcome:
    """Run the cells that have no result yet; one that fails is reported and the others go on.

    A result with questions whose media could not be read is run once more, asking only those.
    workers: what shares the cells, or how many processes do.
    Writes folder/cells/*.json, the list of the experiment's cells and what became of them
    (folder/cells/<experiment>.index), and the simulator's traces trace_folder/<model>_<dataset>.pth.
    """
    outcome = Outcome(folder)
    cells = list(dict.fromkeys(cells))
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    workers = workers if isinstance(workers, Workers) else Workers(workers)
    with Bar(cells, experiment) as bar:
        for cell, ran, why in settle(_once(cells), folder, workers, bar, outcome.refused):
            outcome.ran += ran
            if why:
                outcome.failed[cell] = why
            bar.step(cell, ran)
    for cell in cells:
        if cell not in outcome.failed:
            # the same checkpoint may have been at another path when the result was written
            outcome.results.append(replace(read_result(result_file(cell, folder)), cell=cell))
    if trace_folder:
        traces = [result.cell for result in outcome.results if result.cell.kind == "trace"]
        export_traces(outcome, [(cell, trace_folder / pth_name(cell)) for cell in traces])
    write_status(folder, experiment, outcome.results, outcome.complete, outcome.summary())
    return outcome


def settle(
    more: Callable[[], list[Cell]], folder: Path, workers: Workers, bar: Bar, refused: list[str]
) -> Iterator[Settled]:
    """See to it that every cell has a result, those first that have one already.

    more: gives the next cells, none when there are no more (see spread).
    refused: takes a line a worker that was refused.
    """
    left: list[Cell] = []
    while not left and (cells := more()):
        yield from unsettled(cells, folder, left)
    if not left:
        return
    alone: list[Cell] = []  # timed on a machine that does nothing else

    def together() -> list[Cell]:
        while cells := left or more():
            shared = [cell for cell in cells if cell.kind != "cost"]
            alone.extend(cell for cell in cells if cell.kind == "cost")
            left.clear()
            if shared:
                return shared
        return []

    engine, loaded, known = workers.open(), Loader(), Known(folder)
    if engine is None:
        while cells := together():
            here: list[Cell] = []
            yield from unsettled(cells, folder, here)
            for cell in here:
                yield cell, *_attempt(cell, known, loaded)
    elif (cells := together()) or workers.engine == "ray":  # this machine may have no GPU
        left += cells
        with engine:
            yield from spread(together, known, engine, workers.shard, bar)
            while alone and workers.engine == "ray":
                yield from spread(_once([alone.pop(0)]), known, engine, workers.shard, bar)
            refused += engine.refused
    for cell in alone:
        yield cell, *_attempt(cell, known, loaded)


def _once(cells: list[Cell]) -> Callable[[], list[Cell]]:
    """Gives the cells when it is asked for the first time."""
    batches = iter([cells])
    return lambda: next(batches, [])


def _attempt(cell: Cell, known: Known, loaded: Loader) -> tuple[bool, str | None]:
    """Run a cell. Returns whether it has a result now, and else why not."""
    try:
        path = result_file(cell, known.folder)
        with claimed(path):
            if resume(cell, known.folder):  # another process was at it
                return False, None
            _run(cell, path, loaded, known.answers(cell))
    except Exception as error:  # an unforeseen fault must not cost the other cells
        return False, one_line(error)
    return True, None


def _run(cell: Cell, path: Path, loaded: Loader, known: dict[Question, dict[str, Any]]) -> None:
    """Run one cell and write its result."""
    require(DATASETS[cell.dataset])  # before a model is loaded in vain
    vlm = loaded(cell)
    start = time.time()
    content = _look(cell, path, vlm) if cell.looks else _score(cell, path, vlm, known)
    about = {**describe_run(vlm, cell), "seconds": time.time() - start}
    shared = sum((sample["task"], sample["doc_id"]) in known for sample in content.get("samples", ()))
    write_result(cell, path, content, about | ({"shared": shared} if shared else {}))


def _look(cell: Cell, path: Path, vlm: VLM) -> dict[str, Any]:
    """What a cell about one question gives."""
    if cell.kind == "cost":
        return {"measured": measure_cost(vlm, cell)}
    view = path.with_suffix(".view.npz")
    record_view(vlm, cell, view)
    return {"view": view.name}


def _score(cell: Cell, path: Path, vlm: VLM, known: dict[Question, dict[str, Any]]) -> dict[str, Any]:
    """What a cell that asks questions gives; what was answered before a crash is taken from its journal."""
    keep = (lambda task, doc, run: run.trace.save(trace_file(path, task, doc))) if cell.kind == "trace" else None
    evaluation = evaluate(
        vlm,
        make_method(cell.method, cell.settings),
        DATASETS[cell.dataset],
        limit=cell.limit,
        journal=work_folder(path) / "journal.jsonl",
        known=known,
        save_trace=keep,
        seed=cell.seed,
        blank=cell.kind == "blank",
    )
    return {**evaluation.to_dict(), **choose_trace(cell, path, evaluation.samples)}
