"""Cells about one question: what a prefill of it costs, what a view of it shows; and which one a trace is of."""

from pathlib import Path
from typing import Any

from focuslib.errors import UserError
from focuslib.evaluation.measure import measure
from focuslib.experiments.cell import Cell
from focuslib.explore.view import run_view
from focuslib.methods import Focus
from focuslib.methods.settings import make_method
from focuslib.models import VLM
from focuslib.models.media import readable_images

REPEATS = 5  # prefills, of which the fastest counts
TRIED = 10  # questions, of which the first whose media can be read is taken


def measure_cost(vlm: VLM, cell: Cell) -> dict[str, float]:
    """Time (the shortest of some prefills, seconds), peak memory above the loaded model (MiB), and sparsity.

    The methods here emulate the savings of an accelerator; this says what the emulation itself costs.
    """
    media, prompt = first_question(vlm, cell.dataset)
    with make_method(cell.method, cell.settings)(vlm) as run:
        inputs = vlm.prepare(media, prompt)
        vlm.prefill(inputs)  # warms up
        seconds, mebibytes = measure(lambda: vlm.prefill(inputs), REPEATS, vlm.device)
    return {"seconds": seconds, "mebibytes": mebibytes, "computation_sparsity": run.sparsity}


def record_view(vlm: VLM, cell: Cell, path: Path) -> None:
    """Run a question dense and under the cell's method, and write what a view of it shows (explore.view.ViewData)."""
    method = make_method(cell.method, cell.settings)
    probe = method if isinstance(method, Focus) else Focus()
    run_view(vlm, *_question(vlm, cell), method, probe).save(path)


def _question(vlm: VLM, cell: Cell) -> tuple[Any, str]:
    """The media and prompt that a view is of."""
    from focuslib.evaluation.lmms import question

    return first_question(vlm, cell.dataset) if cell.sample is None else question(cell.dataset, vlm.name, cell.sample)


def first_question(vlm: VLM, dataset: str) -> tuple[Any, str]:
    """The media and prompt of a data set's first question whose media can be read."""
    from focuslib.evaluation.lmms import one_line, question  # lmms-eval takes ten seconds to import

    problem = "it has none"
    for number in range(TRIED):
        try:
            with readable_images(f"{dataset} {number}"):
                media, prompt = question(dataset, vlm.name, number)
            vlm.prepare(media, prompt)
        except (Exception, SystemExit) as error:  # the latter is how some stock tasks report a missing video
            problem = one_line(error)
        else:
            return media, prompt
    raise UserError(f"{dataset}: none of the first {TRIED} questions could be read; the last: {problem}")


def median_sample(samples: list[dict[str, Any]]) -> int:
    """The sample of (lower) median weighted sparsity, of those that were answered."""
    answered = [index for index, sample in enumerate(samples) if "error" not in sample]
    return answered[median_index([samples[index]["weighted_sparsity"] for index in answered])]


def median_index(values: list[float]) -> int:
    """The first index of the (lower) median."""
    return values.index(sorted(values)[(len(values) - 1) // 2])
