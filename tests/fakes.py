"""Work without a model, for the tests of engines; it leaves notes in the folder that a cell has as its checkpoint."""

import os
import signal
import time
from pathlib import Path

from focuslib.errors import UserError
from focuslib.experiments.cell import Cell
from focuslib.experiments.engine import Answer, NodeError, Report
from focuslib.experiments.shards import Shard


def shards_of(folder: Path, count: int, questions: int = 2, model: str = "tiny_onevision", kind: str = "slow"):
    """Shards of a cell, numbered from 1."""
    cell = Cell(kind, model, "tinyvideo_motion", "dense", {}, None, "cpu", "float32", 0, checkpoint=str(folder))
    numbers = [range(start, start + questions) for start in range(0, count * questions, questions)]
    return [Shard(cell, n, count, tuple(("task", i) for i in each)) for n, each in enumerate(numbers, 1)]


class Fake:
    """Answers with the question, notes that it did, and behaves as the kind of the cell says."""

    def answer(self, shard):
        folder, kind = Path(shard.cell.checkpoint), shard.cell.kind
        for task, number in shard.questions if kind != "idle" else ():
            if number == (2 if kind == "refuses" else 3):  # the first of its shard, the second
                misbehave(folder, kind)
            if kind == "slow":
                time.sleep(0.1)
            with (folder / "asked").open("a") as file:
                file.write(f"{number} {os.getpid()} {shard.cell.model}\n")
            yield Answer({"key": f"{task} {number}", "task": task, "doc_id": number, "answer": str(number)})
        yield Report({"seconds": 0.0})


def misbehave(folder: Path, kind: str) -> None:
    """What happens in the second shard."""
    if kind == "fails":
        raise RuntimeError("a fault\nof ours")
    if kind == "wrong":
        raise UserError("settings that fit no question")
    first = not (folder / kind).exists()
    (folder / kind).touch()
    if kind == "dies" and first:
        time.sleep(0.2)  # what was answered before is on its way
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "refuses" and first:
        raise NodeError("node x has another checkpoint than the driver")
