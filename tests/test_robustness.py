"""A run that is interrupted, killed or out of disk goes on where it was; a piece of a file is never read as whole."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import untrained_checkpoint

from focuslib.evaluation import journal
from focuslib.experiments.cell import make_cell
from focuslib.experiments.runner import run_cells
from focuslib.experiments.store import collect, read_result
from focuslib.models import TinyOnevision
from focuslib.prefill.trace import Trace
from focuslib.report import notebook as report

SMALL = {"selected_layers": [1, 3, 5], "retention": [0.6, 0.4, 0.2], "vector_size": 16, "m_tile": 64}
QUESTIONS = 4

RUN = """
import os, resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_robustness import cells, run
from focuslib.evaluation.journal import Journal
checkpoint, folder, answers, how, size = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
original, given = Journal.add, []
def add(self, *args):
    original(self, *args)
    given.append(1)
    if len(given) == answers:
        os.kill(os.getpid(), how)
Journal.add = add
if size:  # bytes that a file may have: a write beyond fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
print(run(cells(checkpoint), folder).summary())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """The tables of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert not run(cells(checkpoint), folder).failed
    return tables(folder)


def cells(checkpoint: str):
    common = {
        "model": "tiny_onevision",
        "dataset": "tinyvideo_motion",
        "limit": QUESTIONS,
        "device": "cpu",
        "dtype": "float32",
    }
    make = lambda kind, method, **settings: make_cell(  # noqa: E731
        kind, method=method, settings=settings, checkpoint=checkpoint, seed=0, **common
    )
    return [make("accuracy", "dense"), make("trace", "focus", **SMALL)]


def run(chosen, folder: Path, workers: int = 1):
    return run_cells("main", chosen, folder, folder / "focus_main", workers)


def tables(folder: Path) -> dict[str, bytes]:
    report.write_tables(folder)
    written = [*folder.glob("*.csv"), *folder.glob("focus_main/*.pth")]
    return {path.name: path.read_bytes() for path in written}


def run_apart(
    checkpoint: str, folder: Path, answers: int = 0, how: int = 0, size: int = 0
) -> subprocess.CompletedProcess:
    """A run in a process of its own, which gets the signal `how` when it has kept so many answers."""
    code = RUN.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, checkpoint, folder, answers, int(how), size]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def answers_kept(folder: Path) -> int:
    in_journals = sum(path.read_bytes().count(b"\n") for path in folder.glob("work/*/journal.jsonl"))
    return in_journals + sum(len(read_result(path).samples) for path in folder.glob("cells/*.json"))


def check_resumes(checkpoint: str, folder: Path, expected: dict, kept: int, monkeypatch) -> None:
    """A new run asks only what was not answered, and ends with the tables of an undisturbed one."""
    asked = []
    original = TinyOnevision.generate_ids
    monkeypatch.setattr(TinyOnevision, "generate_ids", lambda self, *a, **k: asked.append(1) or original(self, *a, **k))
    outcome = run(cells(checkpoint), folder)
    assert not outcome.failed and len(asked) == 2 * QUESTIONS - kept
    assert tables(folder) == expected
    assert not list(folder.rglob("*.partial")) and not list((folder / "work").iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("answers", [2, QUESTIONS + 1, 2 * QUESTIONS])
def test_a_stopped_run_loses_nothing(checkpoint, expected, tmp_path, monkeypatch, how, answers):
    stopped = run_apart(checkpoint, tmp_path, answers, how)
    assert stopped.returncode in (-how, 128 + how), stopped.stderr
    assert answers_kept(tmp_path) == answers
    assert collect(tmp_path) == []  # there is no index of a run that did not end
    check_resumes(checkpoint, tmp_path, expected, answers, monkeypatch)


@pytest.mark.parametrize("size", [300, 2500])
def test_a_full_disk_fails_cells_and_loses_nothing(checkpoint, expected, tmp_path, monkeypatch, size):
    full = run_apart(checkpoint, tmp_path, size=size)
    assert "File too large" in full.stdout + full.stderr
    kept = answers_kept(tmp_path)
    assert kept < 2 * QUESTIONS
    for path in tmp_path.glob("cells/*.json"):
        read_result(path)
    check_resumes(checkpoint, tmp_path, expected, kept, monkeypatch)


def test_workers_give_the_same_tables(checkpoint, expected, tmp_path):
    chosen = cells(checkpoint)
    assert run(chosen, tmp_path, workers=2).ran == 2
    assert tables(tmp_path) == expected
    assert not list((tmp_path / "work").iterdir())
    assert run(chosen, tmp_path, workers=2).ran == 0


WITH_WORKERS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from focuslib.evaluation.journal import Journal
original, given = Journal.add, []
def add(self, *args):
    original(self, *args)
    given.append(1)
    if len(given) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = add
if __name__ == "__main__":
    from test_robustness import cells, run
    run(cells(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def test_a_killed_run_with_workers_goes_on(checkpoint, expected, tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(WITH_WORKERS.format(tests=str(Path(__file__).parent)))
    folder = tmp_path / "results"
    killed = subprocess.run([sys.executable, script, checkpoint, folder], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    for lock in folder.glob("locks/*"):  # the workers end with it, in a moment
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    kept = answers_kept(folder)
    assert 2 <= kept < 2 * QUESTIONS
    check_resumes(checkpoint, folder, expected, kept, monkeypatch)


FAILURES = {
    "the journal": (journal.os, "fsync", 3),
    "the result": (journal.json, "dump", 0),
    "the trace": (Trace, "save", 2),
    "the simulator's file": (Trace, "save_pth", 0),
    "the move into place": (Path, "replace", 1),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failing_write_anywhere_is_made_good_by_the_next_run(checkpoint, expected, tmp_path, monkeypatch, what):
    where, name, successes = FAILURES[what]
    original, calls = getattr(where, name), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == successes + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, fails)
    try:
        outcome = run(cells(checkpoint), tmp_path)
        assert any("No space left" in why for why in outcome.failed.values())
    except OSError as error:
        assert error.errno == errno.ENOSPC
    monkeypatch.setattr(where, name, original)
    check_resumes(checkpoint, tmp_path, expected, answers_kept(tmp_path), monkeypatch)


def test_a_piece_of_a_file_is_never_read(checkpoint, expected, tmp_path):
    chosen = cells(checkpoint)
    assert not run(chosen, tmp_path).failed
    result = tmp_path / "cells" / f"{chosen[0].name()}.json"
    for name in (result, tmp_path / "focus_main" / "tiny_onevision_tinyvideo_motion.pth"):
        name.with_name(name.name + ".partial").write_bytes(name.read_bytes()[:100])
        name.unlink()
    outcome = run(chosen, tmp_path)
    assert (outcome.ran, outcome.failed) == (1, {})
    assert tables(tmp_path) == expected
