"""The notebooks: the teaching one runs, and every experiment's parameters fit its notebook."""

import json

import nbformat
import papermill
import pytest
from tiny_models import untrained_checkpoint

from focuslib.experiments import paper, speed
from focuslib.experiments.paper import plan, study_hardware
from focuslib.experiments.params import EXPERIMENTS
from focuslib.experiments.store import read_status
from focuslib.paths import project_root
from focuslib.report import notebook as report
from focuslib.report.speed import speed_table

ROOT = project_root()


def test_the_teaching_notebook_runs(tmp_path):
    parameters = {"checkpoint": str(untrained_checkpoint(tmp_path / "checkpoint")), "limit": 2}
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "extend.ipynb"), str(tmp_path / "out.ipynb"), parameters=parameters, cwd=str(ROOT),
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
    assert "StillTokens(threshold=0.98): score" in printed
    lines = [line.split(":", 1)[1] for line in printed.splitlines() if line.startswith(("tiny_onevision:", "my_vlm:"))]
    assert len(lines) == 2 and lines[0] == lines[1]
    sources = {
        tag: cell.source.splitlines() for cell in cells for tag in ("StillTokens(M", "MyVlm(V") if tag in cell.source
    }
    assert (
        len(sources["StillTokens(M"]) <= 23 and len(sources["MyVlm(V"]) <= 43
    )  # twenty and forty, without the registry


@pytest.mark.parametrize(
    ("experiment", "profile"),
    [*((name, "laptop") for name in EXPERIMENTS), *((name, "paper") for name in EXPERIMENTS if name != "curves")],
)
def test_the_parameters_fit_their_notebook(experiment, profile):
    params, cells = plan(experiment, profile)
    assert params["results"] == profile
    assert cells if experiment not in ("hardware", "speed") else cells == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_notebook_restates_no_value(experiment):
    """What it takes is the profile and changes to its file; Run All in JupyterLab runs the laptop's file as it is."""
    notebook = ROOT / "notebooks" / f"{experiment}.ipynb"
    found = papermill.inspect_notebook(str(notebook))
    assert {name: found[name]["default"] for name in found} == {"profile": '"laptop"', "changes": "{}"}
    assert f"params/<profile>/{experiment}.yaml" in found["changes"]["help"]


def test_the_hardware_notebook_without_and_with_results(tmp_path, monkeypatch):
    """Without a run of the profile the paper's part stands alone, and a line says what to run."""
    results = tmp_path / "results"
    monkeypatch.setattr(paper, "results_folder", lambda name: results)
    assert study_hardware("laptop").ours.empty
    status = read_status(results, "hardware")
    assert status["complete"] and "no meta_data.csv; run the main notebook" in status["text"]
    outcome = paper.run("main", "laptop", {
        "checkpoints": {"tiny_onevision": str(untrained_checkpoint(tmp_path / "checkpoint"))},
        "datasets": ["tinyvideo_motion"], "limit": 1, "trace_samples": 1, "write_pth": False, "workers": 1,
    })  # fmt: skip
    report.write_tables(outcome.folder)
    study = study_hardware("laptop", {"accelerators": ["dense", "focus"]})
    assert list(study.ours["accelerator"]) == ["dense", "focus"]
    assert (results / "hardware" / "main_focus.csv").is_file()
    for path in (results / "cells").glob("*.trace"):
        path.unlink()
    study = study_hardware("laptop")
    assert list(study.ours["accelerator"]) == ["dense"]
    assert "focus left out" in read_status(results, "hardware")["text"]


def test_the_speed_notebook_measures_anew_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "results_folder", lambda name: tmp_path)
    changes = {
        "checkpoints": {"tiny_onevision": str(untrained_checkpoint(tmp_path / "checkpoint"))},
        "datasets": ["tinyvideo_motion", "videomme"], "methods": ["dense", "focus"], "repeats": 1,
    }  # fmt: skip
    study = speed.study_speed("laptop", changes)
    assert [row["method"] for row in study.rows] == ["dense", "focus"]
    assert len(study.missing) == 1 and study.missing[0].startswith("tiny_onevision on videomme")
    status = read_status(tmp_path, "speed")
    assert not status["complete"] and "videomme" in status["text"]
    first = json.loads((tmp_path / speed.FILE).read_text())
    assert first["rows"] == json.loads(json.dumps(study.rows)) and first["machine"]["threads"] == 1
    (tmp_path / speed.FILE).write_text("of another machine")
    speed.study_speed("laptop", {**changes, "datasets": ["tinyvideo_motion"]})
    assert read_status(tmp_path, "speed")["complete"]
    assert list(speed_table(study.rows)["Method"]) == ["dense", "focus"]
    assert json.loads((tmp_path / speed.FILE).read_text())["rows"][0]["prefill_ms"] > 0


def test_committed_notebooks_carry_no_output():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path.name
