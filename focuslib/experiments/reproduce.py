"""Run all experiment notebooks of a profile in order, and say at the end what became of them."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from focuslib.errors import UserError
from focuslib.experiments.asking import Asked, ask
from focuslib.experiments.cell import Cell
from focuslib.experiments.made import as_made, forget_made, note_made
from focuslib.experiments.notebooks import execute
from focuslib.experiments.paper import plan, results_folder
from focuslib.experiments.params import EXPERIMENTS, Experiment
from focuslib.experiments.store import read_status
from focuslib.paths import params_folder


def reproduce(
    profile: str,
    only: str | None = None,
    changes: dict[str, Any] | None = None,
    workers: dict[str, Any] | None = None,
) -> bool:
    """Run the cells of the notebooks, or of one, and execute each when its cells have their results.

    A failing notebook does not stop the others. Returns whether all cells have a result.
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

    start, refused = time.time(), []
    asked = {name: Asked(name, *plans[name]) for name in chosen if plans[name][1] and not stays(name)}
    notebooks, made, ready = _InTurn(), {}, set(chosen) - set(asked)

    def execute_ready() -> None:
        """Have those executed that are ready, in order: some show what others have left, and the last one is timed."""
        for name in chosen[len(made) :]:
            if name not in ready:
                return
            made[name] = notebooks.add(partial(_made, name, profile, of[name], plans[name], stays))

    for one in ask(list(asked.values()), refused):
        ready.add(one.name)
        execute_ready()
    execute_ready()
    lines, complete = zip(*(future.result() for future in made.values()), strict=True)
    headline = "all is there" if all(complete) else "not all is there"
    ran = len(set().union(*(one.ran for one in asked.values())))
    said = [*lines, *(f"refused: {why}" for why in dict.fromkeys(refused))]
    print(f"\n{headline}, after {(time.time() - start) / 60:.1f} min; {ran} cells run", *said, sep="\n")
    return all(complete)


def _made(
    name: str, profile: str, changes: dict[str, Any], planned: tuple[dict[str, Any], list[Cell]], stays: Callable
) -> tuple[str, bool]:
    """Execute a notebook, unless it stays as it is. Returns what became of it, and whether its cells have results."""
    params, own = planned
    results, began = results_folder(params["results"]), time.time()
    if stays(name):
        return f"{name} (as it was): {read_status(results, name)['text']}".replace("\n", "\n    "), True
    forget_made(name, results)
    try:
        notebook = execute(name, profile, changes)
        status = read_status(results, name)
        if status["complete"]:
            note_made(name, results, params, own)
        what, complete = f"{status['text']}\ntables and figures: {notebook}", status["complete"]
    except UserError as error:
        what, complete = f"failed: {error}", False
        with suppress(OSError):  # what the cells said before the notebook failed
            status = read_status(results, name)
            what += f"\n{status['text']}" if status["time"] >= began else ""
    return f"{name} ({(time.time() - began) / 60:.1f} min): {what}".replace("\n", "\n    "), complete


class _InTurn:
    """Does what it is given, one after another, beside all else.

    In a thread that an interrupted run does not wait for: what a notebook needs is there already, or is kept.
    """

    def __init__(self):
        self._given: SimpleQueue[tuple[Future, Callable[[], Any]]] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()

    def add(self, task: Callable[[], Any]) -> Future:
        """Do this after all that was given before."""
        future: Future = Future()
        self._given.put((future, task))
        return future

    def _work(self) -> None:
        while True:
            future, task = self._given.get()
            try:
                future.set_result(task())
            except BaseException as error:  # the caller's, who asks for the result
                future.set_exception(error)
