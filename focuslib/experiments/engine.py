"""What every engine does: give shards to workers, and pass on what these send as soon as it is there."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

from focuslib.errors import UserError
from focuslib.experiments.cell import Cell
from focuslib.experiments.finish import one_line
from focuslib.experiments.shards import Model, Question, Shard, needs_of
from focuslib.models.base import Needs

AHEAD = 2  # shards that a worker is given at a time: it need not wait for the driver between them
NEAR = 16  # shards, the first of a model, of which a worker is given one that it has the clips of
STARTS = 3  # of a worker, one after another, before it is given up
DIED = "its process died, perhaps for want of memory; run again, with fewer workers"


@dataclass(frozen=True)
class Answer:
    """One question's answer. entry: as a journal keeps it. trace: the content of its trace file, if one is wanted."""

    entry: dict[str, Any]
    trace: bytes | None = None


@dataclass(frozen=True)
class Report:
    """A shard is done. about: on what it ran, and its seconds.

    content, view: what a cell about one question gave, and the content of its view file.
    """

    about: dict[str, Any]
    content: dict[str, Any] | None = None
    view: bytes | None = None


@dataclass(frozen=True)
class Fault:
    """A shard ended before it was done. again: whether another try may do better."""

    why: str
    again: bool


@dataclass(frozen=True)
class Refused:
    """A worker whose node is not as the driver's: it is given nothing more."""

    why: str


Message = Answer | Report | Fault | Refused


class NodeError(UserError):
    """What a node lacks or has in another version than the driver."""


class Work(Protocol):
    """What a worker process holds, from shard to shard."""

    def answer(self, shard: Shard) -> Iterator[Answer | Report]:
        """Everything that a shard gives, a report last. Raises UserError, or NodeError."""
        ...


class Engine(Protocol):
    """Where shards are answered. Entering it starts or finds the workers, leaving it ends those it started.

    running: worker → the shard it is at. workers: how many there are now. refused: one line a worker that was refused.
    """

    running: dict[str, Shard]
    refused: list[str]

    @property
    def workers(self) -> int: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, queue: Queue) -> Iterator[tuple[Shard, Message]]:
        """Have the queue's shards answered, those too that are put into it meanwhile, until it is empty.

        Of every shard that is taken a Report or a Fault comes last.
        """
        ...


def messages(work: Work, shard: Shard) -> Iterator[Message]:
    """What a worker sends of a shard, its errors too."""
    try:
        yield from work.answer(shard)
    except NodeError as error:
        yield Refused(str(error))
    except Exception as error:  # an unforeseen fault must not cost the other shards
        yield Fault(one_line(error), again=not isinstance(error, UserError))


def not_started(why: str) -> str:
    """Why a worker that does not come is given up."""
    return f"a worker could not be started in {STARTS} tries ({why})"


def refuse_rest(queue: Queue, refused: list[str]) -> Iterator[tuple[Shard, Message]]:
    """Give up what waits where every worker was refused."""
    while shard := queue.take():
        yield shard, Fault(refused[-1] if refused else "there is no worker", again=False)


@dataclass
class Held:
    """What a worker has in memory: a model, and the clips of what it was asked with that, as far as they fit."""

    model: Model | None = None
    asked: set[Question] = field(default_factory=set)


class Queue:
    """Shards that wait for a worker.

    A worker goes on with the model it holds. One that has none, or whose model's shards are all taken, gets the model
    of which most seconds wait for each worker that would then be at it. It goes on with the clips that it has, too
    (see models.features), as far as the order of cells allows.
    """

    def __init__(self, shards: Iterable[Shard] = ()):
        self._waiting: dict[Model, deque[Shard]] = {}
        self._seconds: defaultdict[Model, float] = defaultdict(float)
        self._holders: Counter[Model] = Counter()
        self._asked: defaultdict[Model, set[Question]] = defaultdict(set)  # of any worker that holds the model
        for shard in shards:
            self.put(shard)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, shard: Shard, first: bool = False) -> None:
        """Add a shard, behind those of its model or before them."""
        line = self._waiting.setdefault(shard.model, deque())
        line.appendleft(shard) if first else line.append(shard)
        self._seconds[shard.model] += shard.expected

    def take(self, held: Held | None = None, needs: Needs | None = None) -> Shard | None:
        """The next shard of a worker; None: there is none.

        held: what the worker holds, to which the shard is added; None: nothing. needs: only of models that need this.
        """
        held = held or Held()
        open_ = [model for model, line in self._waiting.items() if line and needs in (None, needs_of(model))]
        if not open_:
            return None
        if held.model not in open_:
            self.let_go(held)
            held.model = max(open_, key=lambda model: self._seconds[model] / (1 + self._holders[model]))
            self._holders[held.model] += 1
        line = self._waiting[held.model]
        shard = _choose(line, held.asked, self._asked[held.model])
        line.remove(shard)
        self._seconds[held.model] -= shard.expected
        held.asked.update(shard.questions)
        self._asked[held.model].update(shard.questions)
        return shard

    def take_back(self, shards: Sequence[Shard], held: Held) -> None:
        """What a worker that ended was given and did not answer, in its order, before all others; it holds nothing."""
        for shard in reversed(shards):
            self.put(shard, first=True)
        self.let_go(held)

    def let_go(self, held: Held) -> None:
        """A worker holds its model no longer: it takes another, or it ended."""
        if held.model is not None:
            self._holders[held.model] -= 1
            self._asked[held.model] -= held.asked
        held.model = None
        held.asked.clear()

    def drop(self, cell: Cell) -> int:
        """Take a cell's shards out; returns how many there were."""
        before = len(self)
        for model, line in self._waiting.items():
            kept = deque(shard for shard in line if shard.cell != cell)
            self._waiting[model], self._seconds[model] = kept, sum(shard.expected for shard in kept)
        return before - len(self)

    def groups(self) -> dict[Needs, int]:
        """How many shards wait, by what their models need."""
        counts: Counter[Needs] = Counter()
        for model, line in self._waiting.items():
            if line:
                counts[needs_of(model)] += len(line)
        return dict(counts)


def _choose(line: deque[Shard], mine: set[Question], anyones: set[Question]) -> Shard:
    """One of the first shards: of the first cell, with clips that the worker has, or none has; else of a later cell."""
    near = list(islice(line, NEAR))
    first = [shard for shard in near if shard.cell is near[0].cell]
    here, ahead = ((shard for shard in some if not mine.isdisjoint(shard.questions)) for some in (first, near))
    new = (shard for shard in first if anyones.isdisjoint(shard.questions))
    return next(chain(here, new, ahead, near))
