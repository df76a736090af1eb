"""One call that scores a method on a data set, through stock lmms-eval."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from focuslib.errors import UserError
from focuslib.evaluation.datasets import Dataset
from focuslib.evaluation.journal import Journal
from focuslib.evaluation.judge import no_unanswered_calls
from focuslib.evaluation.sources import require
from focuslib.methods import Method
from focuslib.models import VLM
from focuslib.prefill.record import Run


@dataclass
class Evaluation:
    """A method's result on a data set.

    score: the published score. samples: one dict a question, in order: task, doc_id, score (0 … 1), answer, category
    (where the score is a mean over categories), the facts of its question that the data set has (see Dataset), and the
    numbers of `lmms.summary`. failures: questions that count as wrong because they could not be read or run, or (final)
    because the method cannot take them.
    """

    score: float
    samples: list[dict[str, Any]]
    failures: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    vlm: VLM,
    method: Method,
    dataset: Dataset,
    *,
    limit: int | None = None,
    journal: Path | None = None,
    known: dict[tuple[str, int], dict[str, Any]] | None = None,
    save_trace: Callable[[str, int, Run], None] | None = None,
    seed: int = 0,
    blank: bool = False,
) -> Evaluation:
    """Score a method on a data set with lmms-eval. limit: the first so many questions of each task (those of
    the embedded benchmark are dealt so that these are a stratified sample; the paper takes the first of stock tasks).

    journal: a file of answered requests; a run that was killed goes on from it. known: (task, doc_id) → entry of
    answers that are there already (see entry_of). save_trace: called with the task, the
    question's number and the run, after each answer. blank: grey pictures are shown instead of the media.
    Raises UserError if the data set is not on this disk.
    """
    require(dataset)
    from focuslib.evaluation.lmms import FocusLmms  # takes ten seconds to import, which a resumed run need not wait for

    log = Journal(journal) if journal else None
    try:
        model = FocusLmms(vlm, method, journal=log, known=known, save_trace=save_trace, blank=blank)
        return _score(model, vlm.name, dataset, limit, seed)
    finally:
        if log:
            log.close()


def score_answers(
    model: str, dataset: Dataset, records: dict[tuple[str, int], dict[str, Any]], *, limit: int | None, seed: int
) -> Evaluation:
    """What `evaluate` gives, of answers that are there already; loads no model.

    model: the adapter's name. records: (task, doc_id) → what was kept of its answer (see FocusLmms.entries).
    Raises UserError if an answer is missing.
    """
    from focuslib.evaluation.lmms import AnsweredLmms

    return _score(AnsweredLmms(records), model, dataset, limit, seed)


def entry_of(sample: dict[str, Any]) -> dict[str, Any]:
    """What was kept of a sample's answer, as FocusLmms.entries gave it, but for its key: it stands after the score."""
    names = list(sample)
    return {name: sample[name] for name in ("task", "doc_id", *names[names.index("score") + 1 :])}


def whole_groups(limit: int | None, dataset: Dataset) -> int | None:
    """A limit in whole groups of questions that are scored together."""
    return None if limit is None else math.ceil(limit / dataset.together) * dataset.together


def _score(model: Any, name: str, dataset: Dataset, limit: int | None, seed: int) -> Evaluation:
    """Have lmms-eval ask a model of its (see lmms.py) and score what it answers. name: the adapter's."""
    import lmms_eval.api.task
    from lmms_eval import evaluator

    from focuslib.evaluation.lmms import load_tasks, without_bars

    manager, tasks = load_tasks(dataset, name)
    with TemporaryDirectory() as submissions, no_unanswered_calls(), without_bars(evaluator, lmms_eval.api.task):
        outcome = evaluator.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=whole_groups(limit, dataset),
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            datetime_str="",
            cli_args=Namespace(output_path=submissions, process_with_media=False),
        )
    samples, failures = [], []
    for task, logged in outcome["samples"].items():
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            entry = dict(model.records[task, sample["doc_id"]])
            entry.pop("key", None)
            identity = {"task": task, "doc_id": sample["doc_id"]}
            if category := dataset.category(sample):
                identity["category"] = category
            if "error" in entry:
                failures.append({**identity, **{name: entry[name] for name in ("error", "final") if name in entry}})
            samples.append({**identity, **dataset.facts(sample), "score": dataset.sample_score(sample), **entry})
    if samples and len(failures) == len(samples):
        raise UserError(f"{dataset.name}: no question could be answered; the first: {failures[0]['error']}")
    return Evaluation(dataset.score(outcome["results"], samples), samples, failures)
