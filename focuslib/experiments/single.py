"""Cells about one question: what a prefill of it costs, and what a view of it shows."""

from pathlib import Path
from typing import Any

from focuslib.errors import UserError
from focuslib.evaluation.measure import measure
from focuslib.experiments.cell import Cell
from focuslib.explore.view import run_view
from focuslib.methods import Focus
from focuslib.methods.settings import make_method
from focuslib.models import VLM

REPEATS = 5  # prefills, of which the fastest counts
TRIED = 10  # questions, of which the first whose media can be read is taken


def measure_cost(vlm: VLM, cell: Cell) -> dict[str, float]:
    """Time (the shortest of some prefills, seconds), peak memory above the loaded model (MiB), and sparsity.

    The methods here emulate the savings of an accelerator; this says what the emulation itself costs.
    """
    inputs = vlm.prepare(*first_question(vlm, cell.dataset))
    with make_method(cell.method, cell.settings)(vlm) as run:
        vlm.prefill(inputs)  # warms up
        seconds, mebibytes = measure(lambda: vlm.prefill(inputs), REPEATS, vlm.device)
    return {"seconds": seconds, "mebibytes": mebibytes, "computation_sparsity": run.sparsity}


def record_view(vlm: VLM, cell: Cell, path: Path) -> None:
    """Run a question dense and under the cell's method, and write what a view of it shows (explore.view.ViewData)."""
    method = make_method(cell.method, cell.settings)
    probe = method if isinstance(method, Focus) else Focus()
    run_view(vlm, *first_question(vlm, cell.dataset), method, probe).save(path)


def first_question(vlm: VLM, dataset: str) -> tuple[Any, str]:
    """The media and prompt of a data set's first question whose media can be read."""
    from focuslib.evaluation.lmms import question  # lmms-eval takes ten seconds to import

    for number in range(TRIED):
        media, prompt = question(dataset, vlm.name, number)
        try:
            vlm.prepare(media, prompt)
        except UserError as error:
            problem = error
        else:
            return media, prompt
    raise UserError(f"{dataset}: none of the first {TRIED} questions could be read; the last: {problem}")
