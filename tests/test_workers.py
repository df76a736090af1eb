"""Worker processes end with the run that started them, and one that dies is said in a line."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from focuslib.experiments import runner
from focuslib.experiments.cell import Cell, make_cell
from focuslib.experiments.engine import Fault, Queue, Report
from focuslib.experiments.local import LocalEngine
from focuslib.experiments.runner import run_cells
from focuslib.experiments.shards import Shard
from focuslib.experiments.worker import Worker

PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
sys.path.insert(0, {tests!r})
from test_workers import Sleep, shard_of
from focuslib.experiments.engine import Queue
from focuslib.experiments.local import LocalEngine
if __name__ == "__main__":
    with LocalEngine(2, Sleep) as engine:
        print(list(engine.run(Queue(map(shard_of, sys.argv[1:])))))
"""


class Sleep:
    """Work that leaves its process number and would go on for long."""

    def answer(self, shard):
        (Path(shard.cell.checkpoint) / "worker").write_text(str(os.getpid()))
        time.sleep(300)
        yield


def shard_of(folder: str) -> Shard:
    return Shard(Cell("accuracy", "tiny_onevision", "x", "dense", {}, 1, "cpu", "float32", 0, checkpoint=folder), 1, 1)


class DiesOfNeedle(Worker):
    def answer(self, shard):
        if "needle" in shard.cell.dataset:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(shard)


class Bars:
    """Work that says whether it would show bars."""

    def answer(self, shard):
        from tqdm import tqdm

        yield Report({"hidden": tqdm(()).disable})


class Stillborn(Bars):
    """Work that fails to begin, or only the first times: each leaves a mark in a file."""

    def __init__(self, file: Path, times: int):
        with file.open("a") as marks:
            marks.write("x")
        if len(file.read_text()) <= times:
            raise ImportError("no such package here")


def wait_for(condition, seconds: float = 600) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("before", [None, "0"])
def test_workers_show_no_bars_and_leave_the_drivers(before, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if before:
        monkeypatch.setenv("TQDM_DISABLE", before)
    with LocalEngine(1, Bars) as engine:
        reports = [message for _, message in engine.run(Queue([shard_of("")]))]
    assert [report.about for report in reports] == [{"hidden": True}] and os.environ.get("TQDM_DISABLE") == before


def test_workers_that_never_begin_are_given_up_in_a_line(tmp_path):
    with LocalEngine(2, partial(Stillborn, tmp_path / "marks", 1000)) as engine:
        answered = list(engine.run(Queue([shard_of("a"), shard_of("b"), shard_of("c")])))
        assert engine.workers == 0 and len(engine.refused) == 2
    assert [shard.cell.checkpoint for shard, _ in answered] == ["a", "b", "c"]
    assert {message for _, message in answered} == {Fault(engine.refused[0], again=False)}
    assert "could not be started in 3 tries" in engine.refused[0] and "__main__" in engine.refused[0]
    assert len((tmp_path / "marks").read_text()) == 6


def test_a_worker_that_begins_late_costs_no_shard_a_fault(tmp_path):
    with LocalEngine(1, partial(Stillborn, tmp_path / "marks", 2)) as engine:
        assert [type(message) for _, message in engine.run(Queue([shard_of("a"), shard_of("b")]))] == [Report, Report]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, how):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    code = tmp_path / "parent.py"
    code.write_text(PARENT.format(tests=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, code, *folders], stderr=subprocess.DEVNULL)
    notes = [folder / "worker" for folder in folders]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes))
    workers = [int(note.read_text()) for note in notes]
    assert all(map(is_running, workers))
    parent.send_signal(how)
    assert parent.wait(600) != 0
    wait_for(lambda: not any(map(is_running, workers)))


def test_an_exception_ends_the_workers(tmp_path):
    with pytest.raises(ZeroDivisionError), LocalEngine(1, Sleep) as engine:
        Thread(target=lambda: list(engine.run(Queue([shard_of(str(tmp_path))]))), daemon=True).start()
        note = tmp_path / "worker"
        wait_for(lambda: note.exists() and note.read_text())
        raise ZeroDivisionError
    wait_for(lambda: not is_running(int((tmp_path / "worker").read_text())))


def test_a_worker_that_dies_costs_only_its_cell(tmp_path, monkeypatch):
    common = {"model": "tiny_onevision", "limit": 1, "device": "cpu", "dtype": "float32", "seed": 0}
    names = ("motion", "needle", "attributes")
    chosen = [make_cell("accuracy", dataset=f"tinyvideo_{name}", method="dense", **common) for name in names]
    monkeypatch.setattr(runner, "LocalEngine", partial(LocalEngine, make=DiesOfNeedle))
    outcome = run_cells("main", chosen, tmp_path, workers=2)
    assert [result.cell for result in outcome.results] == [chosen[0], chosen[2]]
    ((cell, why),) = outcome.failed.items()
    assert cell == chosen[1] and "process died" in why
