"""Run all experiment notebooks of a profile in order, and say at the end what became of them."""

import time
from contextlib import suppress
from itertools import chain
from typing import Any

from focuslib.errors import UserError
from focuslib.experiments.made import as_made, forget_made, note_made
from focuslib.experiments.notebooks import execute
from focuslib.experiments.paper import plan, results_folder
from focuslib.experiments.params import EXPERIMENTS, Experiment
from focuslib.experiments.progress import announce
from focuslib.experiments.store import read_status
from focuslib.paths import params_folder


def reproduce(
    profile: str,
    only: str | None = None,
    changes: dict[str, Any] | None = None,
    workers: dict[str, Any] | None = None,
) -> bool:
    """Run the notebooks, or one; a failing one does not stop the others. Returns whether all cells have a result.

    Without `only`, a notebook that would be made again as it is stays (see made.as_made).
    changes: replace values of every parameter file (see notebooks.execute). workers: the same, of those with cells.
    Prints one summary.
    Raises UserError for a mistake in any parameter file, before anything runs.
    """
    if only and only not in EXPERIMENTS:
        raise UserError(f"unknown notebook {only!r}; one of {', '.join(EXPERIMENTS)}")
    folder = params_folder() / profile
    has = [name for name in EXPERIMENTS if (folder / f"{name}.yaml").exists()]
    chosen = [only] if only else has or list(EXPERIMENTS)  # a profile need not have all; one without any is a mistake
    of = {
        name: {**(changes or {}), **(workers or {} if issubclass(EXPERIMENTS[name], Experiment) else {})}
        for name in chosen
    }
    plans = {name: plan(name, profile, of[name]) for name in chosen}

    def stays(name: str) -> bool:
        params, own = plans[name]
        return not only and as_made(name, results_folder(params["results"]), params, own)

    work = [[] if stays(name) else own for name, (_, own) in plans.items()]  # what stays is neither done nor left
    start, lines, whole = time.time(), [], True
    for number, experiment in enumerate(chosen):
        params, own = plans[experiment]
        results = results_folder(params["results"])
        if stays(experiment):
            text = read_status(results, experiment)["text"]
            lines.append(f"{experiment} (as it was): {text}".replace("\n", "\n    "))
            continue
        announce(list(chain(*work[:number])), own, list(chain(*work[number + 1 :])), start)
        began = time.time()
        forget_made(experiment, results)
        try:
            notebook = execute(experiment, profile, of[experiment])
            status = read_status(notebook.parent, experiment)
            if status["complete"]:
                note_made(experiment, results, params, own)
            what, complete = f"{status['text']}\ntables and figures: {notebook}", status["complete"]
        except UserError as error:
            what, complete = f"failed: {error}", False
            with suppress(OSError):  # what the cells said before the notebook failed
                status = read_status(results, experiment)
                what += f"\n{status['text']}" if status["time"] >= began else ""
        lines.append(f"{experiment} ({(time.time() - began) / 60:.1f} min): {what}".replace("\n", "\n    "))
        whole &= complete
    headline = "all is there" if whole else "not all is there"
    print(f"\n{headline}, after {(time.time() - start) / 60:.1f} min", *lines, sep="\n")
    return whole
