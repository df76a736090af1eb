"""What the engines are held to, measured on this machine: empty shards, speed on two workers, and a run that is hit.

python -m benchmarks.cluster empty            10,000 shards of nothing: seconds, and the driver's memory
python -m benchmarks.cluster speed            one cell of 480 questions on one worker and on two
python -m benchmarks.cluster faults           a profile on two nodes of a Ray cluster, with and without faults
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.two_nodes import Nodes, descendants
from focuslib.experiments.cell import Cell, make_cell
from focuslib.experiments.cluster import RayEngine
from focuslib.experiments.engine import Answer, Queue, Report
from focuslib.experiments.local import LocalEngine
from focuslib.experiments.shards import Shard, questions_of, split
from focuslib.experiments.worker import Worker

DRIVER = """
import json, os, sys
from pathlib import Path
from focuslib.experiments import spread
from focuslib.experiments.paper import run
from focuslib.report.notebook import write_tables
results, kept, address, experiments, changes = sys.argv[1:]
keep = spread.CellRun.keep
def noted(self, answer):
    keep(self, answer)
    with open(kept, "a") as file:
        file.write(json.dumps([self.path.stem, answer.entry["task"], answer.entry["doc_id"]]) + "\\n")
spread.CellRun.keep = noted
if __name__ == "__main__":
    chosen = {"results": results, "workers": 2, **json.loads(changes)}
    if address:
        chosen |= {"engine": "ray", "address": address}
    for experiment in experiments.split(","):
        outcome = run(experiment, "laptop", chosen)
        print(outcome.summary(), flush=True)
        assert outcome.complete
    write_tables(outcome.folder)
"""


class Idle:
    """Does nothing."""

    def answer(self, shard):
        yield Report({"seconds": 0.0})


class OneCore(Worker):
    """A worker of one core, as each of two has here; a single local one would take both."""

    def __init__(self):
        super().__init__()
        torch.set_num_threads(1)


def empty(engine, count: int) -> None:
    """Shards of nothing: what the driver and the way to a worker take."""
    cell = Cell("accuracy", "tiny_onevision", "tinyvideo_motion", "dense", {}, None, "cpu", "float32", 0)
    with engine:
        list(engine.run(Queue([Shard(cell, number, 4) for number in range(4)])))  # until the workers are there
        start = time.perf_counter()
        done = sum(1 for _ in engine.run(Queue([Shard(cell, number, count) for number in range(count)])))
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{type(engine).__name__}: {done} empty shards in {seconds:.1f} s, driver at most {peak:.0f} MiB", flush=True)


def speed(make, size: int, limit: int, repeats: int) -> None:
    """One cell on one worker and on two, all of them warm, in turns: a machine's speed changes by the minute.

    And the same without an engine: two processes that know nothing of each other are as fast as two workers can be.
    Cores may be threads of one, or share its cache.
    """
    cell = make_cell(
        "accuracy", model="tiny_onevision", dataset="tinyvideo_motion", method="focus", limit=limit, device="cpu",
        dtype="float32", seed=0,
    )  # fmt: skip
    identity, questions = cell.identity(), questions_of(cell)
    shards = split(cell, questions, (), size, None, identity)
    walls: dict[tuple[str, int], list[float]] = {}
    for count in [1, 2] * repeats:
        warm = split(cell, questions[: 2 * count], (), 2, None, identity)
        walls.setdefault(("no engine", count), []).append(_without_engine(count, warm, shards))
        engine = make(count, OneCore)
        with engine:
            list(engine.run(Queue(warm)))
            start, inside, answers = time.perf_counter(), 0.0, 0
            for _, message in engine.run(Queue(shards)):
                answers += isinstance(message, Answer)
                inside += message.about["seconds"] if isinstance(message, Report) else 0
            wall = time.perf_counter() - start
        assert answers == len(questions), f"{answers} of {len(questions)} answers; did the source change meanwhile?"
        walls.setdefault((type(engine).__name__, count), []).append(wall)
        print(
            f"{type(engine).__name__}, {count} workers: {answers} questions in {len(shards)} shards, {wall:.1f} s; "
            f"{inside:.1f} s of it answering, so that {100 * (count * wall / inside - 1):.1f} % are not; "
            f"without an engine {walls['no engine', count][-1]:.1f} s",
            flush=True,
        )
    for name in sorted({name for name, _ in walls}):
        one, two = (statistics.median(walls[name, count]) for count in (1, 2))
        print(f"{name}: two have {one / two:.2f} × the speed of one (medians of {repeats})", flush=True)


def _without_engine(count: int, warm: list[Shard], shards: list[Shard]) -> float:
    """Seconds that processes take for the shards, dealt out beforehand. EOFError if one of them ends early."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for number in range(count):
        here, there = spawn.Pipe()
        dealt = there, warm[number : number + 1], shards[number::count]
        spawn.Process(target=_answer_alone, args=dealt, daemon=True).start()
        there.close()  # so that the end of the process is the end of the pipe
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    start = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    for pipe in pipes:
        pipe.recv()
    return time.perf_counter() - start


def _answer_alone(pipe, warm: list[Shard], shards: list[Shard]) -> None:
    worker = OneCore()
    for shard in warm:
        list(worker.answer(shard))
    pipe.send("warm")
    pipe.recv()
    for shard in shards:
        list(worker.answer(shard))
    pipe.send("done")


def faults(given: argparse.Namespace) -> None:
    """A profile in processes, on two nodes, and on two nodes that are hit: the tables must be the same bytes."""
    folder, dice = given.folder, random.Random(given.seed)
    folder.mkdir(parents=True, exist_ok=True)
    what = given.experiments, given.changes
    if "local" in given.steps:
        drive(folder, "bench-local", "", *what)
    nodes = Nodes(Path("/tmp") / f"focus-bench-{os.getpid()}")
    try:
        nodes.add(head=True)
        nodes.add()
        if "ray" in given.steps:
            drive(folder, "bench-ray", nodes.address, *what)
            compare("bench-local", "bench-ray")
        if "workers" in given.steps:
            stop = threading.Event()
            hits = threading.Thread(target=strike, args=(nodes, dice, given.kills, given.pause, stop))
            hits.start()
            drive(folder, "bench-workers", nodes.address, *what)
            stop.set()
            hits.join()
            compare("bench-local", "bench-workers")
        if "driver" in given.steps:
            for _ in range(3):
                drive(folder, "bench-driver", nodes.address, *what, after=15 + dice.uniform(0, 2 * given.pause))
            drive(folder, "bench-driver", nodes.address, *what)
            compare("bench-local", "bench-driver")
    finally:
        nodes.end()


def drive(folder: Path, name: str, address: str, experiments: str, changes: dict, after: float | None = None) -> None:
    """Run the experiments into results/<name> in a process of its own, which is killed after some seconds."""
    kept = folder / f"{name}.kept"
    script = folder / "driver.py"
    script.write_text(DRIVER)
    before = kept.read_text().count("\n") if kept.exists() else 0
    call = [sys.executable, str(script), name, str(kept), address, experiments, json.dumps(changes)]
    start = time.time()
    with (folder / f"{name}.log").open("a") as log:
        driver = subprocess.Popen(call, stdout=log, stderr=log)
        try:
            driver.wait(after)
            assert driver.returncode == 0, f"see {log.name}"
            how = f"ended after {time.time() - start:.0f} s"
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            how = f"killed after {after:.0f} s"
    lines = kept.read_text().splitlines()
    twice = sum(count - 1 for count in Counter(lines).values())
    new = len(lines) - before
    print(f"{name}: {how}; {new} answers came, of {len(lines)} in all {twice} were there already", flush=True)


def strike(nodes: Nodes, dice: random.Random, kills: int, pause: float, stop: threading.Event) -> None:
    """Kill workers at random moments, once a whole node; another joins a little later."""
    for number in range(kills + 1):
        if stop.wait(dice.uniform(0.5, 1.5) * pause):
            print(f"the run ended before kill {number + 1}", flush=True)
            return
        if number == kills // 2:
            nodes.kill(1)
            print("killed a node", flush=True)
            stop.wait(pause)
            nodes.add()
            print("a node joined", flush=True)
            continue
        while not (workers := [p for node in nodes.nodes for p in descendants(node.pid) if is_worker(p)]):
            if stop.wait(0.5):  # between two notebooks there are none
                break
        if workers:
            os.kill(dice.choice(workers), signal.SIGKILL)
            print("killed a worker", flush=True)


def is_worker(process: int) -> bool:
    """Whether a process is an actor that holds a model."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_Host")
    except OSError:
        return False


def compare(one: str, other: str) -> None:
    """Tables, the simulator's traces and the cells but for times and provenance, byte for byte."""
    a, b = (contents(Path("results") / name) for name in (one, other))
    different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    tables = sum(name.endswith(".csv") for name in a)
    said = f"{len(different)} differ: {different[:5]}" if different else "all the same bytes"
    print(f"{one} and {other}: {tables} tables, {len(a) - tables} traces and cells, {said}", flush=True)


def contents(folder: Path) -> dict[str, bytes]:
    """What is compared of a results folder: file → content. Cells that measure time are left out."""
    files = [*folder.glob("*.csv"), *folder.rglob("*.pth"), *folder.glob("cells/*.trace")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for path in folder.glob("cells/*.json"):
        value = json.loads(path.read_text())
        if value["cell"]["kind"] != "cost":
            value.pop("provenance")
            for sample in value["samples"]:
                sample.pop("seconds", None)
            found[path.name] = json.dumps(value).encode()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["empty", "speed", "faults"])
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--count", type=int, default=10_000, help="empty shards")
    parser.add_argument("--shard", type=int, default=20, help="questions a shard, of speed")
    parser.add_argument("--limit", type=int, default=480, help="questions, of speed")
    parser.add_argument("--repeats", type=int, default=3, help="of speed")
    parser.add_argument("--experiments", default="main,baselines,dse,int8,image", help="of faults")
    parser.add_argument("--changes", type=json.loads, default={}, help="of faults, such as '{\"limit\": 20}'")
    parser.add_argument("--steps", nargs="+", default=["local", "ray", "workers", "driver"], help="of faults")
    parser.add_argument("--kills", type=int, default=5, help="of workers")
    parser.add_argument("--pause", type=float, default=14.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/cluster"))
    given = parser.parse_args()
    if given.what == "faults":
        faults(given)
        return
    nodes = None
    if given.engine == "ray":
        nodes = Nodes(Path("/tmp") / f"focus-bench-{os.getpid()}")
        nodes.add(head=True)
        nodes.add()
    try:
        make = (lambda count, *w: RayEngine(count, nodes.address, *w)) if nodes else LocalEngine
        if given.what == "empty":
            empty(make(2, Idle), given.count)
        else:
            speed(make, given.shard, given.limit, given.repeats)
    finally:
        if nodes:
            nodes.end()


if __name__ == "__main__":
    main()
