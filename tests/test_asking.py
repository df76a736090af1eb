"""Several experiments over one set of workers: nothing is asked twice, and no worker waits between them."""

from dataclasses import replace

import pytest
from test_shards import Here
from tiny_models import untrained_checkpoint

from focuslib.experiments import asking, runner
from focuslib.experiments.asking import Asked, ask
from focuslib.experiments.cell import make_cell
from focuslib.experiments.store import read_result, result_file


class Watched(Here):
    """Notes the cell of every shard that is taken, and how many wait then."""

    def __init__(self):
        super().__init__()
        self.taken, self.waiting, self.entered = [], [], 0

    def __enter__(self):
        self.entered += 1
        return self

    def run(self, queue):
        for shard, message in super().run(queue):
            if not self.taken or self.taken[-1] is not shard:
                self.taken.append(shard)
                self.waiting.append(len(queue))
            yield shard, message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(untrained_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def engine(tmp_path, monkeypatch):
    engine = Watched()
    monkeypatch.setattr(runner, "LocalEngine", lambda count: engine)
    monkeypatch.setattr(asking, "results_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(asking, "further_cells", lambda name, params, results: [])
    return engine


@pytest.fixture
def cells(checkpoint):
    """Of dense, Focus, dense on grey pictures, and what a prefill costs."""
    common = {"dataset": "tinyvideo_motion", "device": "cpu", "dtype": "float32", "seed": 0, "checkpoint": checkpoint}
    kinds = [("accuracy", "dense", 4), ("accuracy", "focus", 4), ("blank", "dense", 4), ("cost", "dense", 1)]
    return [make_cell(kind, model="tiny_onevision", method=name, limit=limit, **common) for kind, name, limit in kinds]


def asked(name, cells, **params):
    return Asked(
        name, {"results": "all", "workers": 2, "engine": "local", "address": None, "shard": 2, **params}, cells
    )


def has_result(folder, cell) -> bool:
    return result_file(cell, folder).exists()


def test_experiments_follow_without_a_pause_and_share_their_cells(cells, engine, tmp_path):
    dense, focus, grey, cost = cells
    first, second = asked("main", [dense, focus]), asked("baselines", [dense, grey, cost])
    found = []
    for one in ask([first, second], []):
        assert all(has_result(tmp_path / "all", cell) for cell in one.cells)
        found.append(one.name)
    assert found == ["main", "baselines"] and engine.entered == 1
    assert [shard.cell for shard in engine.taken] == [dense] * 2 + [focus] * 2 + [grey] * 2  # the cost in this process
    assert all(waiting for waiting in engine.waiting[:-1])
    assert (first.ran, second.ran) == ({dense, focus}, {dense, grey, cost})
    assert [one.ran for one in ask([asked("main", [dense, focus])], [])] == [set()] and engine.entered == 1


def test_cells_that_are_known_later_are_asked_before_those_of_the_next(cells, engine, tmp_path, monkeypatch):
    dense, focus, grey, _ = cells

    def further(name, params, results):
        if name == "other":
            return []
        assert [result.cell for result in results] == [dense]
        return [grey]

    monkeypatch.setattr(asking, "further_cells", further)
    names = []
    for one in ask([asked("curves", [dense]), asked("other", [focus])], []):
        names.append((one.name, sorted(cell.kind for cell in one.ran)))
        assert one.name == "other" or has_result(tmp_path / "all", grey)
    assert sorted(names) == [("curves", ["accuracy", "blank"]), ("other", ["accuracy"])]


def test_what_differs_in_workers_or_folder_is_run_apart(cells, engine, tmp_path):
    dense = cells[0]
    names = [one.name for one in ask([asked("main", [dense]), asked("image", [dense], results="else")], [])]
    assert names == ["main", "image"] and engine.entered == 2
    assert has_result(tmp_path / "all", dense) and has_result(tmp_path / "else", dense)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_fails_holds_nothing_up(cells, engine, tmp_path, workers):
    dense, focus, *_ = cells
    missing = replace(dense, checkpoint="no/such/folder")
    first, second = asked("main", [missing], workers=workers), asked("methods", [focus, missing], workers=workers)
    assert [one.name for one in ask([first, second], [])] == ["main", "methods"]
    assert (first.ran, second.ran) == (set(), {focus})
    assert read_result(result_file(focus, tmp_path / "all")).failures == []
