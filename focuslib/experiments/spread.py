"""Cells over the workers of an engine: split into shards, their answers kept in journals, scored when all are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import score_answers
from focuslib.evaluation.journal import Journal, lasting
from focuslib.evaluation.sources import require
from focuslib.experiments.cell import Cell
from focuslib.experiments.engine import AHEAD, Answer, Engine, Fault, Message, Queue, Report
from focuslib.experiments.finish import (
    Settled,
    choose_trace,
    one_line,
    resume,
    trace_file,
    unsettled,
    write_result,
)
from focuslib.experiments.known import Known, gives
from focuslib.experiments.progress import Bar
from focuslib.experiments.published import expected_work, seconds_a_question
from focuslib.experiments.shards import Question, Shard, questions_of, split
from focuslib.experiments.store import claimed, result_file, work_folder
from focuslib.files import write_bytes, write_json
from focuslib.paths import shown

TRIES = 3  # of a shard, without an answer in between


class CellRun:
    """A cell that is being run: what is known of it, in its work folder.

    records: question → the entry of its answer. about: on what it ran. failed: why it will have no result now.
    known: further answers, that other cells have. claim: keeps other processes from it, and its journal open.
    """

    def __init__(self, cell: Cell, path: Path, claim: ExitStack, known: dict[Question, dict[str, Any]]):
        self.cell, self.path, self.identity, self.claim = cell, path, cell.identity(), claim
        work = work_folder(path)
        self.journal = Journal(work / "journal.jsonl")
        claim.callback(self.journal.close)
        self.records = {(entry["task"], entry["doc_id"]): entry for entry in self.journal.entries.values()}
        self.known = {question: entry for question, entry in known.items() if question not in self.records}
        self._about = work / "about.json"
        self.about: dict[str, Any] | None = json.loads(self._about.read_text()) if self._about.exists() else None
        self.content: dict[str, Any] = {}
        self.questions: list[Question] = []
        self.shards = self.count = 0  # that are not done; of all that were left
        self.failed: str | None = None
        self.tries: dict[int, tuple[int, int]] = {}  # shard number → faults, questions left at the last one

    @property
    def work_done(self) -> float:
        """Of its work, that of the questions that are answered, until it has its result."""
        under_way = self.shards > 0 and self.questions
        return expected_work(self.cell) * len(self.records) / len(self.questions) if under_way else 0.0

    def split(self, size: int | None) -> list[Shard]:
        """The shards that are left; one without questions where only what the cell ran on is not known."""
        require(DATASETS[self.cell.dataset])
        shards = []
        if not self.cell.looks:
            self.questions = questions_of(self.cell)
            self.known = {question: self.known[question] for question in self.questions if question in self.known}
            self.records |= self.known
            seconds = seconds_a_question(self.cell)
            shards = split(self.cell, self.questions, self.records.keys(), size, seconds, self.identity)
        if not shards and self.about is None:
            shards = [Shard(self.cell, 1, 1, (), self.identity)]
        self.shards = self.count = len(shards)
        return shards

    def keep(self, answer: Answer) -> None:
        """Keep an answer, on disk before this returns, but for one that must be asked again in another run."""
        entry = answer.entry
        question = entry["task"], entry["doc_id"]
        if answer.trace is not None:
            write_bytes(trace_file(self.path, *question), answer.trace)
        if lasting(entry):
            self.journal.add(entry["key"], entry)
        self.records[question] = entry

    def note(self, report: Report) -> None:
        """A shard is done."""
        self.shards -= 1
        seconds = self.about["seconds"] if self.about else 0.0
        self.about = {**(self.about or report.about), "seconds": seconds + report.about["seconds"]}
        write_json(self._about, self.about)
        if report.content is not None:
            self.content = dict(report.content)
        if report.view is not None:
            view = self.path.with_suffix(".view.npz")
            write_bytes(view, report.view)
            self.content["view"] = view.name

    def fault(self, shard: Shard, fault: Fault) -> Shard | None:
        """What is left of a shard that ended early, to be tried again; None: that is the end of the shard."""
        left = tuple(question for question in shard.questions if question not in self.records)
        faults, before = self.tries.get(shard.number, (0, -1))
        faults = faults + 1 if len(left) == before or before < 0 else 1
        self.tries[shard.number] = faults, len(left)
        if fault.again and faults < TRIES:
            return Shard(self.cell, shard.number, shard.count, left, shard.identity, shard.seconds)
        self.shards -= 1
        self.failed = self.failed or self._explain(shard, fault, len(left))
        return None

    def _explain(self, shard: Shard, fault: Fault, left: int) -> str:
        """Why there is no result, in a line."""
        if not fault.again:
            return fault.why
        return f"{shard} failed {TRIES} times, {left} of its questions without an answer: {fault.why}"

    def finish(self) -> None:
        """Score the answers and write the result."""
        content = self.content
        if not self.cell.looks:
            cell = self.cell
            dataset = DATASETS[cell.dataset]
            found = score_answers(cell.model, dataset, self.records, limit=cell.limit, seed=cell.seed)
            content = {**found.to_dict(), **choose_trace(cell, self.path, found.samples)}
        shared = {"shared": len(self.known)} if self.known else {}
        write_result(self.cell, self.path, content, {**(self.about or {}), **shared})


def spread(
    more: Callable[[], list[Cell]], known: Known, engine: Engine, size: int | None, bar: Bar
) -> Iterator[Settled]:
    """Run cells on an entered engine; each is given out as soon as it is settled.

    more: gives the next cells, none when there are no more; it is asked whenever few shards wait, so that no worker
    waits for the last of the cells before. known: the results folder, and what is known there.
    size: questions a shard (see shards.split).
    Raises UserError if an answer cannot be kept, on a full disk: nothing that is answered from then on would be.
    """
    runs: dict[Cell, CellRun] = {}
    later: list[Cell] = []  # cells that wait for the answers of others
    queue = Queue()
    watch = _Watch(engine, runs, bar)
    with ExitStack() as claims:

        def begin(cells: list[Cell]) -> Iterator[Settled]:
            before = set(runs)
            later.extend(cells)
            yield from _begin(later, known, size, queue, runs, claims)
            bar.found(sum(run.work_done for cell, run in runs.items() if cell not in before))

        def refill() -> Iterator[Settled]:
            while len(queue) < AHEAD * max(1, engine.workers) and (cells := more()):
                yield from begin([cell for cell in cells if cell not in runs and cell not in later])

        yield from refill()
        for shard, message in engine.run(queue):
            run = runs[shard.cell]
            _take(run, shard, message, queue, known.folder)
            watch.show()
            if not run.shards:
                yield _settle(run)
                run.shards = -1
                yield from begin([])  # some may have waited for it
            yield from refill()


def _begin(
    cells: list[Cell], known: Known, size: int | None, queue: Queue, runs: dict[Cell, CellRun], claims: ExitStack
) -> Iterator[Settled]:
    """Put the shards of cells into the queue; those that have nothing to ask are settled.

    What a cell that is being run will answer is not asked for another one: that stays in `cells`, for later.
    """
    left: list[Cell] = []
    folder = known.folder
    yield from unsettled(cells, folder, left)
    cells.clear()
    for cell in left:
        if any(run.shards > 0 and gives(other, cell) for other, run in runs.items()):
            cells.append(cell)
            continue
        try:
            path = result_file(cell, folder)
            claim = claims.enter_context(ExitStack())
            claim.enter_context(claimed(path))
            if settled := resume(cell, folder):  # another process was at it
                claim.close()
                yield settled
                continue
            run = CellRun(cell, path, claim, known.answers(cell))
            shards = run.split(size)
        except UserError as error:
            yield cell, False, str(error)
            continue
        runs[cell] = run
        for shard in shards:
            queue.put(shard)
        if not shards:  # it was stopped between its last answer and its result
            yield _settle(run)
            run.shards = -1


def _take(run: CellRun, shard: Shard, message: Message, queue: Queue, folder: Path) -> None:
    """See to what a worker sent."""
    try:
        if isinstance(message, Answer):
            run.keep(message)
        elif isinstance(message, Report):
            run.note(message)
        elif isinstance(message, Fault):
            if again := run.fault(shard, message):
                queue.put(again, first=True)
            elif not message.again:  # the others would end likewise
                run.shards -= queue.drop(run.cell)
    except OSError as error:
        why = f"{error.strerror or error}; what was answered before is kept"
        raise UserError(f"{shown(folder)}: an answer could not be kept ({why}): make room, and run again") from error


def _settle(run: CellRun) -> Settled:
    """Give a cell whose shards are all done its result."""
    with run.claim:
        if run.failed is not None:
            lacking = len(run.questions) - len(run.records)
            incomplete = f"; the cell is incomplete, {lacking} of {len(run.questions)} questions are not answered"
            return run.cell, False, run.failed + (incomplete if run.questions else "")
        try:
            run.finish()
        except Exception as error:  # an unforeseen fault must not cost the other cells
            return run.cell, False, one_line(error)
        return run.cell, True, None


class _Watch:
    """Says on the bar how far the shards are of all cells that were begun. runs: those, with more as they are begun."""

    def __init__(self, engine: Engine, runs: dict[Cell, CellRun], bar: Bar):
        self.engine, self.runs, self.bar = engine, runs, bar

    def show(self) -> None:
        """Say it, at most some times a second."""
        if not self.bar.due():
            return
        runs = self.runs.values()
        count, left = sum(run.count for run in runs), sum(max(run.shards, 0) for run in runs)
        answered, asked = sum(len(run.records) for run in runs), sum(len(run.questions) for run in runs)
        at = ", ".join(f"{name} {shard.cell.method} {shard.number}/{shard.count}" for name, shard in self._few())
        faults = sum(faults for run in runs for faults, _ in run.tries.values())
        self.bar.say(
            f"{count - left}/{count} shards, {answered}/{asked} questions, "
            f"{self.engine.workers} workers ({at}), {faults} faults",
            sum(run.work_done for run in runs),
        )

    def _few(self) -> list[tuple[str, Shard]]:
        return sorted(self.engine.running.items())[:4]
