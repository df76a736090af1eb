"""Worker processes end with the run that started them, and one that dies is said in a line."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from focuslib.experiments.cell import make_cell
from focuslib.experiments.pool import process_pool
from focuslib.experiments.runner import run_cells

PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
sys.path.insert(0, {tests!r})
from test_workers import sleep
from focuslib.experiments.pool import process_pool
if __name__ == "__main__":
    with process_pool(2) as pool:
        futures = [pool.submit(sleep, folder) for folder in sys.argv[1:]]
        print([future.result() for future in futures])
"""


def sleep(folder: str) -> None:
    """Work that leaves its process number and would go on for long."""
    (Path(folder) / "worker").write_text(str(os.getpid()))
    time.sleep(300)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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
    with pytest.raises(ZeroDivisionError), process_pool(1) as pool:
        pool.submit(sleep, str(tmp_path))
        wait_for((tmp_path / "worker").exists)
        raise ZeroDivisionError
    wait_for(lambda: not is_running(int((tmp_path / "worker").read_text())))


def test_a_worker_that_dies_costs_only_its_cell(tmp_path, monkeypatch):
    common = {"model": "tiny_onevision", "limit": 1, "device": "cpu", "dtype": "float32", "seed": 0}
    names = ("motion", "needle", "attributes")
    chosen = [make_cell("accuracy", dataset=f"tinyvideo_{name}", method="dense", **common) for name in names]
    submit = ProcessPoolExecutor.submit

    def lethal(self, function, cell, *rest):
        return submit(self, die) if cell == chosen[1] else submit(self, function, cell, *rest)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", lethal)
    outcome = run_cells("main", chosen, tmp_path, workers=2)
    assert [result.cell for result in outcome.results] == [chosen[0], chosen[2]]
    ((cell, why),) = outcome.failed.items()
    assert cell == chosen[1] and "process died" in why
