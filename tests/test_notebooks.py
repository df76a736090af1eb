"""The notebooks: the teaching one runs, and every experiment's parameters fit its notebook."""

import nbformat
import papermill
import pytest
from tiny_models import untrained_checkpoint

from focuslib.experiments.notebooks import EXPERIMENTS
from focuslib.experiments.paper import planned_cells
from focuslib.experiments.params import read_params
from focuslib.paths import project_root

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


@pytest.mark.parametrize("profile", ["laptop", "paper"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_parameters_fit_their_notebook(experiment, profile):
    params = read_params(ROOT / "params" / profile / f"{experiment}.yaml")
    notebook = ROOT / "notebooks" / f"{experiment}.ipynb"
    assert not set(params) - set(papermill.inspect_notebook(str(notebook)))
    assert planned_cells(experiment, params)


def test_committed_notebooks_carry_no_output():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path.name
