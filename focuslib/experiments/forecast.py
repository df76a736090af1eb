"""What a profile will take on so many GPUs: its shards, by a clock alone, as the engines give them out."""

from __future__ import annotations

import heapq
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from focuslib.errors import UserError
from focuslib.experiments.cell import Cell
from focuslib.experiments.engine import AHEAD, Answer, Held, Queue
from focuslib.experiments.paper import plan, sweep_points
from focuslib.experiments.params import EXPERIMENTS
from focuslib.experiments.published import published_cost, published_questions, seconds_a_question
from focuslib.experiments.shards import Question, Shard, questions_of, split
from focuslib.experiments.worker import Worker
from focuslib.paths import params_folder

GPUS = (1, 2, 4, 8, 16, 32, 64)
LOADING = 60.0  # seconds to load a model, where none were measured: an assumption


@dataclass
class Forecast:
    """What a profile will take.

    notebooks: the shards of each that runs, in order; one begins when the shards of the one before it run out.
    unknown: cells of which no time is known. loading: seconds to load a model.
    """

    notebooks: dict[str, list[Shard]] = field(default_factory=dict)
    unknown: dict[str, list[Cell]] = field(default_factory=dict)
    loading: float = LOADING

    @property
    def shards(self) -> list[Shard]:
        """All of them."""
        return [shard for shards in self.notebooks.values() for shard in shards]

    @property
    def cells(self) -> list[Cell]:
        """All cells, those too of which no time is known."""
        known = dict.fromkeys(shard.cell for shard in self.shards)
        return [*known, *(cell for cells in self.unknown.values() for cell in cells)]

    @property
    def seconds(self) -> float:
        """Of all questions, on one GPU with the model loaded."""
        return sum(shard.expected for shard in self.shards)

    def makespan(self, gpus: int) -> float:
        """Seconds from the first question to the last on so many GPUs."""
        return simulate(list(self.notebooks.values()), gpus, self.loading)

    def chain(self) -> float:
        """Seconds that no number of GPUs makes shorter: the longest shard, and loading its model."""
        return max(shard.expected for shard in self.shards) + self.loading

    def table(self, price: float | None) -> pd.DataFrame:
        """One row a number of GPUs: hours, the ideal ones (all GPUs busy to the end), and what they cost together."""
        rows: list[dict[str, Any]] = []
        for gpus in GPUS:
            hours, ideal = self.makespan(gpus) / 3600, self.seconds / 3600 / gpus
            row = {"GPUs": gpus, "hours": hours, "ideal hours": ideal, "over ideal (%)": 100 * (hours / ideal - 1)}
            rows.append(row | ({"cost": gpus * hours * price} if price is not None else {}))
        return pd.DataFrame(rows)


def simulate(notebooks: list[list[Shard]], workers: int, loading: float) -> float:
    """Seconds until workers, who take shards as those of an engine do, have done those of all notebooks."""
    queue, end, coming = Queue(), 0.0, iter(notebooks)
    free, all_held = [(0.0, number) for number in range(workers)], [Held() for _ in range(workers)]
    while free:
        now, number = heapq.heappop(free)
        held = all_held[number]
        while len(queue) < AHEAD * workers and (shards := next(coming, None)) is not None:
            for shard in shards:
                queue.put(shard)
        before, shard = held.model, queue.take(held)
        if shard is None:
            continue  # there is nothing more for it
        now += shard.expected + (loading if shard.model != before else 0.0)
        end = max(end, now)
        heapq.heappush(free, (now, number))
    return end


def forecast(profile: str, size: int | None = None, probe: int | None = None) -> Forecast:
    """What a profile's notebooks will take, from published seconds a question, or from a probe on this machine.

    size: questions a shard (see shards.split). probe: ask so many questions of every method, data set and model here.
    Raises UserError for faulty parameter files, or if of no cell a time is known.
    """
    found, seen = Forecast(), set()
    probed = _Probe(probe) if probe else None
    for experiment in EXPERIMENTS:
        if not (params_folder() / profile / f"{experiment}.yaml").is_file():
            continue
        params, cells = plan(experiment, profile)
        cells = [cell for cell in cells if cell not in seen]
        seen.update(cells)
        seconds = {cell: probed(cell) if probed else seconds_a_question(cell) for cell in cells}
        if probed is None:
            _share_out(experiment, params, seconds)
        shards, unknown = [], []
        for cell, each in seconds.items():
            questions = _questions(cell, probe is not None)
            if each is None or questions is None:
                unknown.append(cell)
            else:
                shards += split(cell, questions, (), size, each, {})
        if shards:
            found.notebooks[experiment] = shards
        if unknown:
            found.unknown[experiment] = unknown
    if not found.notebooks:
        raise UserError(f"profile {profile}: no times are published for it; measure some here: --probe 3")
    if probed:
        found.loading = probed.loading
    return found


def _questions(cell: Cell, data: bool) -> list[Question] | None:
    """As many questions as a cell asks; None: not known. data: count those of the data, else the published ones."""
    if cell.looks:
        return [(cell.dataset, 0)]
    if data:
        return questions_of(cell)
    count = published_questions(cell)
    return None if count is None else [(cell.dataset, number) for number in range(count)]


def _share_out(experiment: str, params: dict[str, Any], seconds: dict[Cell, float | None]) -> None:
    """Give traces and the sweeps of the design space the hours that are published of them as a whole."""
    others = published_cost()["others"]
    if experiment == "dse":
        of_sweeps = {cell for point in sweep_points(params) for cell in (point.accuracy, point.trace)}
        _scale(seconds, [cell for cell in seconds if cell in of_sweeps], others.get("DSE"))
    if experiment == "main":
        _scale(seconds, [cell for cell in seconds if cell.kind == "trace"], others.get("traces"))


def _scale(seconds: dict[Cell, float | None], cells: list[Cell], hours: float | None) -> None:
    """Have the questions of cells take so many hours together."""
    known = [(cell, each, len(_questions(cell, False) or ())) for cell in cells if (each := seconds[cell])]
    total = sum(each * count for _, each, count in known)
    if hours is not None and total:
        seconds.update({cell: each * hours * 3600 / total for cell, each, _ in known})


class _Probe:
    """Seconds a question, measured here: the median of some, of each model, data set and method once."""

    def __init__(self, count: int):
        self.count, self.worker = count, Worker()
        self.known: dict[tuple[Any, ...], float] = {}
        self.loading = 0.0

    def __call__(self, cell: Cell) -> float:
        key = (cell.model, cell.checkpoint, cell.dataset, cell.method, cell.quantization)
        if key not in self.known:
            self.known[key] = self._measure(cell)
        return self.known[key]

    def _measure(self, cell: Cell) -> float:
        start = time.perf_counter()
        self.worker.load(cell)
        self.loading = max(self.loading, time.perf_counter() - start)
        questions = tuple(questions_of(cell)[: self.count + 1])
        times, start = [], time.perf_counter()
        for message in self.worker.answer(Shard(cell, 1, 1, questions)):
            if isinstance(message, Answer):
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
        return statistics.median(times[1:] or times)  # the first one warms up


def sizes(found: Forecast) -> str:
    """A line on cells, shards and hours of each notebook."""
    parts = [
        f"{name} {len({id(shard.cell) for shard in shards})} cells, {len(shards)} shards, "
        f"{sum(shard.expected for shard in shards) / 3600:.1f} h"
        for name, shards in found.notebooks.items()
    ]
    return "; ".join(parts)
