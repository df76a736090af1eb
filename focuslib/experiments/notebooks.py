"""Run the experiment notebooks headlessly with papermill, their parameters checked first."""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from focuslib.errors import UserError
from focuslib.experiments.paper import plan, results_folder
from focuslib.paths import project_root


def execute(experiment: str, profile: str, changes: dict[str, Any] | None = None) -> Path:
    """Run notebooks/<experiment>.ipynb with params/<profile>/<experiment>.yaml; returns the executed copy.

    changes: values that replace those of the file; `results` among them names another results folder. The notebook's
    own progress goes to the terminal. Raises UserError for wrong parameters or a failed cell.
    """
    root = project_root()
    source = root / "notebooks" / f"{experiment}.ipynb"
    if not source.is_file():
        raise UserError(f"{source}: no such notebook")
    params, _ = plan(experiment, profile, changes)
    target = results_folder(params["results"]) / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial.ipynb")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else every kernel start prints a debugger warning
    try:
        papermill.execute_notebook(
            str(source),
            str(partial),
            parameters={"profile": profile, "changes": changes or {}},
            cwd=str(root),
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each kernel warns of its unencrypted local port
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        why = " ".join(f"{error.ename}: {error.evalue}".split())
        raise UserError(f"{source.name}: {why} (partial notebook: {partial})") from error
    except DeadKernelError as error:
        why = "its kernel died, perhaps for want of memory; run again to go on from here"
        raise UserError(f"{source.name}: {why}") from error
    tidy(partial)
    partial.replace(target)
    return target


def tidy(path: Path) -> None:
    """Take out of an executed notebook what says nothing: progress bars, and the times and paths papermill notes."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)
