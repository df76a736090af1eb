"""A run of all notebooks leaves those that it would make again as they are."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from focuslib.errors import UserError
from focuslib.experiments import reproduce as module
from focuslib.experiments.cell import make_cell
from focuslib.experiments.paper import results_folder
from focuslib.experiments.reproduce import reproduce
from focuslib.experiments.store import CellResult, write_status
from focuslib.files import write_json
from focuslib.paths import project_root

NAMES = ("main", "hardware")


@dataclass
class Notebooks:
    """What executes notebooks here: it notes which, and leaves a result, a table and the notebook."""

    folder: Path
    executed: list[str] = field(default_factory=list)
    failures: list = field(default_factory=list)
    fails: bool = False

    def execute(self, experiment, profile, changes=None):
        self.executed.append(experiment)
        cell = make_cell(
            "accuracy", model="tiny_onevision", dataset="tinyvideo_motion", method="dense",
            limit=(changes or {}).get("limit", 1), device="cpu", dtype="float32", seed=0,
        )  # fmt: skip
        results = [CellResult(cell, 100.0, [], self.failures, {})] if experiment == "main" else []
        self.folder.mkdir(parents=True, exist_ok=True)
        for result in results:
            about = {"score": 100.0, "samples": [], "failures": result.failures, "provenance": {}}
            write_json(self.folder / "cells" / f"{cell.name()}.json", {"cell": cell.__dict__, **about})
        write_status(self.folder, experiment, results, not self.failures or experiment != "main", "1 cells run")
        (self.folder / "accuracy.csv").write_text("a\n")
        if self.fails:
            raise UserError("it broke")
        (self.folder / f"{experiment}.ipynb").write_text("{}")
        return self.folder / f"{experiment}.ipynb"

    def run(self, **what) -> list[str]:
        """What is executed by one more run."""
        self.executed.clear()
        assert reproduce("laptop", **what) is not (self.fails or bool(self.failures))
        return list(self.executed)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A project with two notebooks."""
    root = project_root()
    for name in NAMES:
        for place in (f"params/laptop/{name}.yaml", f"notebooks/{name}.ipynb"):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / place, tmp_path / place)
    shutil.copy(root / "params" / "methods.yaml", tmp_path / "params")
    shutil.copytree(root / "params" / "published", tmp_path / "params" / "published")
    monkeypatch.chdir(tmp_path)
    made = Notebooks(results_folder("laptop"))
    assert made.folder.is_relative_to(tmp_path)
    monkeypatch.setattr(module, "execute", made.execute)
    monkeypatch.setattr(module, "ask", lambda experiments, refused: iter(experiments))
    return made


def test_a_second_run_makes_nothing(notebooks, capsys):
    assert notebooks.run() == [*NAMES]
    assert notebooks.run() == [] and "main (as it was): 1 cells run" in capsys.readouterr().out
    assert notebooks.run(workers={"workers": 1}) == []  # who answers changes no answer
    assert notebooks.run(only="main") == ["main"]


def change_text(name):
    def change(folder):
        path = folder.parents[1] / name
        path.write_text(
            path.read_text()
            .replace("limit: 240", "limit: 40")
            .replace("Where the", "From where the")
            .replace("cost: 0.4", "cost: 0.5")
        )

    return change


def change_result(folder):
    """A question that could not be read is answered now, under the same name."""
    path = next(folder.glob("cells/*.json"))
    path.write_text(path.read_text().replace('"score": 100.0', '"score": 50.0'))


def run_elsewhere(folder):
    """The notebook was executed with other parameters, by hand."""
    Notebooks(folder).execute("main", "laptop", {"limit": 8})


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (change_text("params/laptop/main.yaml"), ["main"]),
        (change_text("notebooks/main.ipynb"), ["main"]),
        (change_text("params/methods.yaml"), [*NAMES]),
        (lambda folder: (folder / "accuracy.csv").unlink(), ["main"]),  # which writes it anew
        (lambda folder: (folder / "hardware.ipynb").unlink(), ["hardware"]),
        (lambda folder: next(folder.glob("cells/*.json")).unlink(), ["main"]),
        (change_result, ["hardware"]),  # which reads it; that of main stays
        (run_elsewhere, ["main"]),
        (lambda folder: (folder / "cells" / "main.made").write_text("{"), ["main"]),
        (lambda folder: (folder / "cells" / "main.made").write_text("[]"), ["main"]),
    ],
    ids=["parameters", "notebook", "settings", "table", "executed", "result", "other", "jupyter", "note", "list"],
)
def test_what_changes_makes_it_anew(notebooks, change, again):
    notebooks.run()
    change(notebooks.folder)
    assert notebooks.run() == again
    assert notebooks.run() == []


def test_a_run_that_failed_leaves_no_note(notebooks):
    """Else the next run, with the parameters of the first, would take its tables for those of the first."""
    notebooks.run()
    notebooks.fails = True
    assert notebooks.run(only="main", changes={"limit": 8}) == ["main"]
    notebooks.fails = False
    assert notebooks.run() == ["main"] and notebooks.run() == []


def test_what_failed_is_tried_again(notebooks):
    notebooks.failures = [{"task": "tinyvideo_motion", "doc_id": 0}]
    assert notebooks.run() == [*NAMES] and notebooks.run() == ["main"]
    notebooks.failures = []
    assert notebooks.run() == [*NAMES] and notebooks.run() == []  # hardware shows what main has now
    notebooks.fails = True
    change_text("notebooks/main.ipynb")(notebooks.folder)
    assert notebooks.run() == ["main"] and notebooks.run() == ["main"]
    note = json.loads((notebooks.folder / "cells" / "hardware.made").read_text())
    assert {"hardware.ipynb", "accuracy.csv"} <= {*note["files"]}
