"""Both engines: every question of every shard answered once, whatever dies meanwhile."""

import os
import sys
import threading
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import fakes
import pytest
from fakes import shards_of

from focuslib.errors import UserError
from focuslib.experiments import cluster
from focuslib.experiments.engine import Answer, Fault, Queue, Report
from focuslib.experiments.local import LocalEngine
from focuslib.experiments.shards import Shard


def collect(engine, queue, tries=3):
    """Run a queue as spread does: what is left of a shard is put back; returns answers, reports and faults."""
    answers, reports, faults = [], [], []
    for shard, message in engine.run(queue):
        if isinstance(message, Answer):
            answers.append(message.entry["doc_id"])
        elif isinstance(message, Report):
            reports.append(shard.number)
        else:
            faults.append(message)
            if message.again and len(faults) < tries:
                left = tuple(question for question in shard.questions if question[1] not in answers)
                queue.put(Shard(shard.cell, shard.number, shard.count, left), first=True)
    return answers, sorted(reports), faults


def asked(folder: Path) -> list[list[str]]:
    """Number, process and model of each question asked, in order."""
    return [line.split() for line in (folder / "asked").read_text().splitlines()]


def check_all_answered(engine, folder, count=6, kind="slow"):
    answers, reports, faults = collect(engine, Queue(shards_of(folder, count, kind=kind)))
    assert sorted(answers) == list(range(2 * count)) and reports == list(range(1, count + 1))
    assert engine.running == {}
    return faults


def check_one_killed(engine, folder):
    (fault,) = check_all_answered(engine, folder, kind="dies")
    assert fault.again and "process died" in fault.why
    assert sorted(int(number) for number, *_ in asked(folder)) == list(range(12))  # none twice: 3 was only begun


@pytest.fixture(scope="module")
def two_processes():
    with LocalEngine(2, fakes.Fake) as engine:
        yield engine


def test_every_question_is_answered_once(two_processes, tmp_path):
    assert check_all_answered(two_processes, tmp_path) == [] and len(asked(tmp_path)) == 12


def test_a_worker_goes_on_with_its_model(two_processes, tmp_path):
    queue = Queue(shards_of(tmp_path, 6) + shards_of(tmp_path, 6, model="minicpm_v"))
    list(two_processes.run(queue))
    held: dict[str, list[str]] = {}
    for _, process, model in asked(tmp_path):
        held.setdefault(process, []).append(model)
    changes = sum(a != b for models in held.values() for a, b in pairwise(models))
    assert len(asked(tmp_path)) == 24 and changes <= 1


@pytest.mark.parametrize(("kind", "tries"), [("fails", 2), ("wrong", 1)])
def test_a_fault_is_one_of_its_shard(two_processes, tmp_path, kind, tries):
    answers, reports, faults = collect(two_processes, Queue(shards_of(tmp_path, 3, kind=kind)), tries=2)
    assert sorted(answers) == [0, 1, 2, 4, 5] and reports == [1, 3]
    assert len(faults) == tries and all("\n" not in fault.why for fault in faults)


def test_empty_shards_go_through(two_processes, tmp_path):
    queue = Queue(shards_of(tmp_path, 500, kind="idle"))
    assert sum(isinstance(message, Report) for _, message in two_processes.run(queue)) == 500


def test_a_killed_worker_costs_the_question_in_flight(two_processes, tmp_path):
    check_one_killed(two_processes, tmp_path)


def test_a_refused_worker_is_given_nothing_more(two_processes, tmp_path):
    """The last test of these two: it leaves none."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert check_all_answered(two_processes, first, kind="refuses") == []
    assert two_processes.refused == ["node x has another checkpoint than the driver"] and two_processes.workers == 1
    answers, _, faults = collect(two_processes, Queue(shards_of(second, 4, kind="refuses")), tries=0)
    assert sorted(answers) == [0, 1] and [fault.why for fault in faults] == [two_processes.refused[-1]] * 3


def test_without_ray_the_line_says_what_to_install(monkeypatch, capsys):
    from focuslib import cli

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("focuslib.cli.commands.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"engine ray needs the extra \[cluster\]: pip install 'focuslib\[cluster\]'"):
        cluster.connect(None)
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--engine", "ray"])
    assert capsys.readouterr().err == "focus: --engine ray needs the extra [cluster]: pip install 'focuslib[cluster]'\n"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    if find_spec("ray") is None:  # not imported here: it reads the environment then
        pytest.skip("ray is not installed: pip install 'focuslib[cluster]'")
    from benchmarks.two_nodes import Nodes

    folder = Path("/tmp") / f"focus-ray-{os.getpid()}"  # a socket's path must be short
    nodes = Nodes(folder)
    try:
        nodes.add(head=True)
        yield nodes
    finally:
        nodes.end()


def listeners(processes: list[int]) -> set[str]:
    """The addresses at which processes listen, as the kernel writes them in hexadecimal."""
    sockets = set()
    for process in processes:
        for file in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets.add(os.readlink(file))
            except OSError:  # closed meanwhile
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_what_a_ray_node_lacks_is_said(nodes, tmp_path, monkeypatch):
    cell = shards_of(tmp_path / "nowhere", 1)[0].cell
    (line,) = cluster.missing_on_nodes(nodes.address, [cell])
    assert line.startswith("node 127.0.0.1: ") and "no such folder" in line
    monkeypatch.setattr(cluster, "source_digest", lambda: "another")
    with cluster.RayEngine(1, nodes.address, fakes.Fake) as engine:
        faults = collect(engine, Queue(shards_of(tmp_path, 2)))[2]
    (line,) = engine.refused
    assert "another version of focuslib's source" in line and [fault.why for fault in faults] == [line] * 2
    assert all(isinstance(fault, Fault) and not fault.again for fault in faults)


def test_a_ray_cluster_loses_a_worker_and_a_node_and_gains_one(nodes, tmp_path):
    from benchmarks.two_nodes import descendants

    for name in ("killed", "late", "lost"):
        (tmp_path / name).mkdir()
    with cluster.RayEngine(2, nodes.address, fakes.Fake) as engine:
        check_one_killed(engine, tmp_path / "killed")  # on one node of one CPU: the second worker waits for a place
        late, deadline = nodes.add(), time.time() + 100
        while engine.workers < 2 and time.time() < deadline:
            check_all_answered(engine, tmp_path / "late")
        everything = [number for node in nodes.nodes for number in descendants(node.pid)]
        assert engine.workers == 2 and listeners([*everything, os.getpid()]) <= LOOPBACK
        kill = threading.Thread(target=lambda: (wait_for_two(engine), nodes.kill(late)))
        kill.start()
        faults = check_all_answered(engine, tmp_path / "lost", 60)
        kill.join()
    assert len(faults) <= 1
    numbers = [int(number) for number, *_ in asked(tmp_path / "lost")]
    assert len(numbers) - len(set(numbers)) <= 2  # the question in flight, and an answer on its way


def wait_for_two(engine) -> None:
    while len(engine.running) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
