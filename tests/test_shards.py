"""Cells in shards: the same result whatever the shards and workers, nothing asked twice, and a fault is named."""

import errno
import json
import os
from collections import Counter
from dataclasses import asdict, replace

import pytest
from fakes import shards_of
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import untrained_checkpoint

from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import evaluate, score_answers
from focuslib.evaluation.journal import Journal
from focuslib.experiments import runner
from focuslib.experiments.cell import make_cell
from focuslib.experiments.engine import NEAR, Answer, Fault, Held, Queue, Report, messages, refuse_rest
from focuslib.experiments.runner import Workers, run_cells
from focuslib.experiments.shards import Needs, needs_of, questions_of, shard_size, split
from focuslib.experiments.worker import Worker, load_cell
from focuslib.methods.settings import make_method
from focuslib.models import TinyOnevision

SMALL = {"selected_layers": [1, 3, 5], "retention": [0.6, 0.4, 0.2], "vector_size": 16, "m_tile": 64}


class Here:
    """An engine in this process, which tests can look into. order: "first" or "last" shard first."""

    def __init__(self, order="first"):
        self.order, self.running, self.refused, self.workers = order, {}, [], 1
        self.work = Worker()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, queue):
        while shard := queue.take():
            if self.order == "last":
                taken = [shard]
                while other := queue.take():
                    taken.append(other)
                shard = taken.pop()
                for other in taken:
                    queue.put(other)
            for message in messages(self.work, shard):
                yield shard, message
        yield from refuse_rest(queue, self.refused)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def cells(checkpoint):
    common = {"model": "tiny_onevision", "dataset": "tinyvideo_motion", "device": "cpu", "dtype": "float32", "seed": 0}
    make = lambda kind, method, limit, **settings: make_cell(  # noqa: E731
        kind, method=method, limit=limit, settings=settings, checkpoint=checkpoint, **common
    )
    return [
        make("accuracy", "focus", 5, **SMALL),
        make("trace", "focus", 3, **SMALL),
        make("view", "focus", 1, **SMALL),
    ]


@pytest.fixture(scope="module")
def whole(cells, tmp_path_factory):
    """The results of a run in one process, and its files."""
    folder = tmp_path_factory.mktemp("whole")
    assert not run_cells("main", cells, folder, folder).failed
    return contents(folder)


def contents(folder, shared=()):
    """What a run wrote: results without what depends on the machine, and the bytes of other files.

    shared: the kinds of cells that have answers of others.
    """
    found = {}
    for path in [*folder.glob("cells/*"), *folder.glob("*.pth")]:
        if path.suffix == ".json":
            value = json.loads(path.read_text())
            said = {"packages", "python", "git", "device", "cores", "seconds", "linear_layers"}
            if value["cell"]["kind"] in shared:
                said.add("shared")
            assert set(value.pop("provenance")) == said
            for sample in value["samples"]:
                assert sample.pop("seconds") > 0
            found[path.name] = json.dumps(value)  # the order of names counts too
        elif path.suffix in (".trace", ".pth", ".npz"):
            found[path.name] = path.read_bytes()
    return found


def run_here(monkeypatch, cells, folder, size, engine=None):
    monkeypatch.setattr(runner, "LocalEngine", lambda count: engine or Here())
    return run_cells("main", cells, folder, folder, Workers(2, shard=size))


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("order", ["first", "last"])
def test_the_result_does_not_depend_on_the_shards(cells, whole, tmp_path, monkeypatch, size, order):
    folder = tmp_path / "shards"
    outcome = run_here(monkeypatch, cells, folder, size, Here(order))
    assert (outcome.ran, outcome.failed) == (3, {})
    assert contents(folder) == whole
    assert not list((folder / "work").iterdir()) and not list(folder.rglob("*.partial"))


def test_an_answer_has_the_key_that_evaluate_gives_it(cells, tmp_path):
    cell = cells[0]
    vlm, dataset = load_cell(cell), DATASETS[cell.dataset]
    method = make_method(cell.method, cell.settings)
    evaluate(vlm, method, dataset, limit=cell.limit, journal=tmp_path / "journal")
    (shard,) = split(cell, questions_of(cell), (), 100, None, cell.identity())
    keys = [message.entry["key"] for message in Worker().answer(shard) if isinstance(message, Answer)]
    assert keys == list(Journal(tmp_path / "journal").entries)


def test_what_one_process_answered_the_workers_do_not_ask(cells, whole, tmp_path, monkeypatch):
    folder, asked = tmp_path / "shards", []
    original = TinyOnevision.generate_ids

    def counted(self, *args, **kwargs):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TinyOnevision, "generate_ids", counted)
    with pytest.raises(KeyboardInterrupt):
        run_cells("main", cells[:2], folder)
    asked.clear()
    monkeypatch.setattr(TinyOnevision, "generate_ids", lambda *a, **k: asked.append(1) or original(*a, **k))
    assert not run_here(monkeypatch, cells[:2], folder, 2).failed
    assert len(asked) == 5 + 3 - 4
    assert not run_here(monkeypatch, cells, folder, 2).failed and contents(folder) == whole


def test_scoring_fails_loudly_without_an_answer(cells):
    dataset = DATASETS["tinyvideo_motion"]
    records = {("tinyvideo_motion", 1): {"answer": "a"}}
    with pytest.raises(UserError, match=r"2 of 3 questions have no answer, the first is tinyvideo_motion 0"):
        score_answers("tiny_onevision", dataset, records, limit=3, seed=0)


@given(size=st.integers(1, 12), seconds=st.none() | st.floats(1, 200), done=st.sets(st.integers(0, 40)))
def test_shards_are_a_partition_of_what_is_left(size, seconds, done):
    cell = shards_of("x", 1)[0].cell
    questions = [("a", number) for number in range(25)] + [("b", number) for number in range(9)]
    answered = {("a", number) for number in done}
    shards = split(cell, questions, answered, size, seconds, {})
    assert [q for shard in shards for q in shard.questions] == [q for q in questions if q not in answered]
    assert all(len(shard.questions) <= size and len({task for task, _ in shard.questions}) == 1 for shard in shards)
    again = split(cell, questions, (), size, seconds, {})
    assert {shard.number for shard in shards} <= {shard.number for shard in again}
    for shard in shards:  # it begins where it began
        assert set(shard.questions) <= set(again[shard.number - 1].questions)


def test_the_last_of_several_shards_is_taken_apart():
    cell = shards_of("x", 1)[0].cell

    def sizes(questions, size):
        return [len(shard.questions) for shard in split(cell, [("a", n) for n in range(questions)], (), size, None, {})]

    assert sizes(60, 20) == [20, 20, 10, 5, 5] and sizes(47, 20) == [20, 20, 5, 1, 1]
    assert sizes(43, 20) == [20, 20, 3] and sizes(20, 20) == [20]


@given(size=st.integers(1, 9), count=st.integers(1, 40))
def test_questions_scored_together_stay_together(size, count):
    cell = replace(shards_of("x", 1)[0].cell, dataset="mme")
    shards = split(cell, [("mme", number) for number in range(2 * count)], (), size, None, {})
    assert all(shard.questions[0][1] % 2 == 0 and len(shard.questions) % 2 == 0 for shard in shards)


def test_the_size_of_a_shard_follows_the_seconds():
    assert [shard_size(seconds) for seconds in (None, 1.0, 98.0, 1000.0)] == [20, 300, 3, 1]


def test_a_worker_goes_on_with_its_model(tmp_path):
    one, two = shards_of(tmp_path, 3), shards_of(tmp_path, 4, model="llava_vid")
    queue = Queue(one + two)
    first, second = Held(), Held()
    assert queue.take(first) is two[0]  # most waits of this one
    assert queue.take(second) is one[0]  # of the other, for each worker at it
    assert queue.take(first) is two[1] and queue.take(second) is one[1]
    queue.put(two[1], first=True)
    assert queue.take(first) is two[1] and len(queue) == 3
    assert queue.drop(two[0].cell) == 2 and queue.take(first) is one[2]
    assert first.model == second.model == one[0].model
    assert queue.take() is None and queue.groups() == {}


def test_a_worker_is_asked_again_about_the_clips_it_has(tmp_path):
    cells = [shards_of(tmp_path, 4) for _ in range(4)]
    queue = Queue(shard for shards in cells for shard in shards)
    first, second = Held(), Held()
    assert [queue.take(first), queue.take(second)] == cells[0][:2]
    assert [queue.take(second), queue.take(first)] == cells[0][2:]  # the first cell comes first
    assert [queue.take(second), queue.take(first)] == [cells[1][1], cells[1][0]]
    assert [queue.take(second) for _ in range(5)] == [cells[n][i] for n, i in ((1, 2), (2, 1), (2, 2), (3, 1), (3, 2))]
    assert queue.take(second) is cells[1][3]  # better than nothing, though the other has its clips
    queue.take_back([cells[1][0]], first)
    assert first == Held()  # a process that is started again has nothing, so that anyone may have what it had
    assert [queue.take(second) for _ in range(2)] == [cells[1][0], cells[2][0]]
    assert [queue.take(first) for _ in range(3)] == [cells[2][3], cells[3][3], cells[3][0]]
    assert queue.take(second) is queue.take(first) is None


def test_only_shards_that_are_soon_due_are_looked_at(tmp_path):
    many = shards_of(tmp_path / "a", NEAR + 3)
    queue, held = Queue(many), Held(many[0].model, {*many[NEAR].questions})
    assert queue.take(held) is many[0]
    assert queue.take(held) is many[NEAR]


def test_models_say_what_they_need():
    assert needs_of(("llava_vid", None, "cuda", "bfloat16", None)) == Needs(1, 32)
    assert needs_of(("tiny_onevision", None, "cpu", "float32", None)) == Needs(0, 2)


class Faulty(Here):
    """Its worker fails at question 3 as often as it is told."""

    def __init__(self, times, fault):
        super().__init__()
        original, self.times = self.work, times

        class Work:
            def answer(_, shard):
                for message in original.answer(shard):
                    at_three = isinstance(message, Answer) and message.entry["doc_id"] == 3
                    if at_three and shard.cell.kind == "accuracy" and self.times:
                        self.times -= 1
                        raise fault
                    yield message

        self.work = Work()


def test_a_shard_is_tried_three_times(cells, whole, tmp_path, monkeypatch):
    assert not run_here(monkeypatch, cells, tmp_path / "twice", 2, Faulty(2, RuntimeError("no"))).failed
    assert contents(tmp_path / "twice") == whole
    folder = tmp_path / "thrice"
    outcome = run_here(monkeypatch, cells, folder, 2, Faulty(3, RuntimeError("two\nlines")))
    ((cell, why),) = outcome.failed.items()
    assert cell == cells[0] and len(outcome.results) == 2 and "\n" not in why
    assert why.startswith("shard 2 of 3 (tinyvideo_motion 3) failed 3 times, 1 of its questions without an answer")
    assert "the cell is incomplete, 1 of 5 questions are not answered" in why and "two lines" in why
    assert not run_here(monkeypatch, cells, folder, 2).failed and contents(folder) == whole


def test_a_users_mistake_is_not_tried_again(cells, tmp_path, monkeypatch):
    engine = Faulty(1, UserError("no such setting"))
    ((_, why),) = run_here(monkeypatch, cells[:1], tmp_path, 1, engine).failed.items()
    assert why.startswith("no such setting") and engine.times == 0


def test_an_unreadable_question_is_asked_again_in_another_run(cells, whole, tmp_path, monkeypatch):
    original = TinyOnevision.prepare
    asked = Counter()

    def lost(self, media, prompt):
        asked[str(media)] += 1
        if len(asked) == 2:
            raise OSError("cannot be read")
        return original(self, media, prompt)

    monkeypatch.setattr(TinyOnevision, "prepare", lost)
    outcome = run_here(monkeypatch, cells[:2], tmp_path / "a", 1)
    assert [len(result.failures) for result in outcome.results] == [1, 0]
    monkeypatch.setattr(TinyOnevision, "prepare", original)
    outcome = run_here(monkeypatch, cells, tmp_path / "a", 1)
    assert not any(result.failures for result in outcome.results)
    assert contents(tmp_path / "a", shared=["accuracy"]) == whole


def test_a_full_disk_ends_the_run_in_one_line(cells, whole, tmp_path, monkeypatch):
    original, left = Journal.add, [2]

    def add(self, *args):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        original(self, *args)

    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(UserError, match=r"could not be kept \(No space left on device.*run again") as said:
        run_here(monkeypatch, cells, tmp_path / "full", 2)
    assert "\n" not in str(said.value)
    monkeypatch.setattr(Journal, "add", original)
    assert not run_here(monkeypatch, cells, tmp_path / "full", 2).failed and contents(tmp_path / "full") == whole


@pytest.mark.parametrize("what", ["checkpoint", "source", "data", "packages"])
def test_a_node_with_something_else_is_refused(cells, what):
    cell = cells[0]
    (shard,) = split(cell, questions_of(cell), (), 100, None, {**cell.identity(), what: "another"})
    (refused,) = messages(Worker(), shard)
    assert f"has another {what} than the driver" in refused.why and "\n" not in refused.why


def test_a_node_without_the_checkpoint_is_refused(cells):
    cell = replace(cells[0], checkpoint="/no/such/folder")
    (shard,) = split(cell, questions_of(cells[0]), (), 100, None, cells[0].identity())
    (refused,) = messages(Worker(), shard)
    assert "no such folder" in refused.why


def test_messages_are_what_a_journal_keeps(cells):
    cell = cells[1]
    (shard,) = split(cell, questions_of(cell), (), 100, None, cell.identity())
    *answers, report = messages(Worker(), shard)
    assert isinstance(report, Report) and all(answer.trace for answer in answers)
    for answer in answers:
        assert json.loads(json.dumps(answer.entry)) == answer.entry
    assert asdict(Fault("why", True)) == {"why": "why", "again": True}
