"""Evaluation through stock lmms-eval: our models as one of its model classes, and one call that scores a method."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from focuslib.errors import InputError, UserError, pick
from focuslib.journal import Journal, digest
from focuslib.media import readable_images
from focuslib.methods.base import Method, PrefillRecord
from focuslib.methods.settings import make_method
from focuslib.models import MODELS, VLM
from focuslib.ops import SITES, dense_operations
from focuslib.patch import Run
from focuslib.tasks.datasets import DATASETS, Dataset
from focuslib.tasks.judge import no_unanswered_calls
from focuslib.tasks.sources import require

if TYPE_CHECKING:
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager

# Generation arguments of the tasks that a greedy decoder understands; the others (temperature, beams) are left out.
_GENERATION = ("max_new_tokens",)
DTYPES = ("auto", "float32", "bfloat16", "float16")


class FocusLmms(lmms):
    """A loaded VLM under one method, as lmms-eval sees it.

    From the command line: `lmms-eval --model focuslib --model_args model=tiny_onevision,method=focus,m_tile=512 …`.
    Every further argument is a setting of the method; lists are written 1:3:5.
    """

    is_simple = True

    def __init__(
        self,
        model: str | VLM = "tiny_onevision",
        method: str | Method = "dense",
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        journal: Journal | None = None,
        save_trace: Callable[[str, int, Run], None] | None = None,
        **settings: Any,
    ):
        super().__init__()
        if int(batch_size) != 1:
            raise UserError(f"batch_size is {batch_size}; methods act on one sequence at a time, use batch_size 1")
        settings.pop("max_batch_size", None)
        self.vlm = model if isinstance(model, VLM) else load_vlm(model, pretrained, device=device, dtype=dtype)
        self.method = method if isinstance(method, Method) else make_method(method, settings)
        self.journal = journal
        self.save_trace = save_trace
        self.records: dict[tuple[str, int], dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"{self.vlm.name} under {self.method}"

    @property
    def device(self) -> torch.device:
        return self.vlm.device

    def clean(self) -> None:
        """Keep the model: the next method uses it too."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer every request; those in the journal are not run again."""
        answers = []
        with self.method(self.vlm, trace=self.save_trace is not None) as run:
            for request in tqdm(requests, desc=f"{self.vlm.name} {self.method.name}", unit="question", leave=False):
                context, generation, _, doc_id, task, split = request.args
                key = digest([repr(self), task, split, doc_id, context, generation])
                entry = self.journal.entries.get(key) if self.journal else None
                if entry is None:
                    entry = self._answer(run, *request.args)
                    if self.journal and ("error" not in entry or "final" in entry):
                        self.journal.add(key, entry)
                self.records[task, doc_id] = entry
                answers.append(entry["answer"])
        return answers

    def _answer(self, run: Run, context: str, generation: dict, to_visual, doc_id: int, task: str, split: str) -> dict:
        """One answer with what the method did; a sample that cannot be read or run is an entry with an error."""
        try:
            with readable_images(f"{task} {doc_id}"):
                visuals = to_visual(self.task_dict[task][split][doc_id]) or [None]
            if len(visuals) > 1:
                raise UserError(f"{len(visuals)} images or videos in one question; the models here take one")
            inputs = self.vlm.prepare(visuals[0], context)
        except (SystemExit, UserError) as error:  # the former is how some stock tasks report a missing video
            logger.warning(f"{task} {doc_id}: {error}")
            return {"answer": "", "error": str(error)}
        start = time.perf_counter()
        try:
            ids = self.vlm.generate_ids(inputs, **{key: generation[key] for key in _GENERATION if key in generation})
        except InputError as error:
            logger.warning(f"{task} {doc_id}: {error}")
            return {"answer": "", "error": str(error), "final": True}
        seconds = time.perf_counter() - start
        answer = self.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        stops = generation.get("until") or ()
        for stop in (stops,) if isinstance(stops, str) else stops:
            answer = answer.split(stop)[0]
        if self.save_trace is not None:
            self.save_trace(task, doc_id, run)
        entry = {"answer": answer, "seconds": seconds, **summary(run.method, run.last)}
        run.prefills.clear()
        return entry

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("focuslib generates answers; tasks that score log-likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("focuslib answers one round; multi-round tasks are not supported")


def summary(method: Method, record: PrefillRecord) -> dict[str, Any]:
    """The numbers of one prefill that go into results: plain values only."""
    grid, counts = record.grid, record.counts
    numbers = {
        "visual_tokens": grid.length,
        "num_frames": grid.num_frames,
        "computation_sparsity": method.computation_sparsity(record),
        "dense_operations": dense_operations(record.shape, grid.length),
        "retained": record.retained,
        "stats": record.stats,
    }
    if counts.layers:
        numbers["site_sparsity"] = {
            site: [layer[site].sparsity(grid.length) for layer in counts.layers] for site in SITES
        }
        numbers["computed_vectors"] = sum(
            grid.length * site.vectors - site.zero - site.similar for layer in counts.layers for site in layer.values()
        )
        numbers["weighted_sparsity"] = counts.weighted_sparsity(record.shape)
    return numbers


def load_vlm(
    name: str, pretrained: str | None = None, *, device: str | None = None, dtype: str = "auto", **settings: Any
) -> VLM:
    """Load a VLM by adapter name. device: None takes the GPU if there is one."""
    adapter = pick(MODELS, name, "model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; write cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: no CUDA GPU here; take --device cpu (device: cpu in a parameter file)")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    return adapter.load(pretrained, device=device, dtype=dtype, **settings)


@dataclass
class Evaluation:
    """A method's result on a data set.

    score: the published score. samples: one dict a question, in order: task, doc_id, score (0 … 1), answer, and the
    numbers of `summary`. failures: questions that count as wrong because their media could not be read, or (final)
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
    save_trace: Callable[[str, int, Run], None] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score a method on a data set with lmms-eval. limit: the first so many questions of each task.

    journal: a file of answered requests; a run that was killed goes on from it. save_trace: called with the task, the
    question's number and the run, after each answer. Raises UserError if the data set is not on this disk.
    """
    require(dataset)
    from lmms_eval import evaluator  # takes ten seconds to import

    if limit is not None:
        limit = math.ceil(limit / dataset.together) * dataset.together
    log = Journal(journal) if journal else None
    model = FocusLmms(vlm, method, journal=log, save_trace=save_trace)
    manager, tasks = load_tasks(dataset, vlm.name)
    try:
        # its own bars run over answers that are there already
        quiet = patch.object(evaluator, "tqdm", lambda *args, **options: tqdm(*args, **{**options, "disable": True}))
        with TemporaryDirectory() as submissions, no_unanswered_calls(), quiet:
            outcome = evaluator.simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                verbosity="ERROR",
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                datetime_str="",
                cli_args=Namespace(output_path=submissions, process_with_media=False),
            )
    finally:
        if log:
            log.close()
    samples, failures = [], []
    for task, logged in outcome["samples"].items():
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            entry = dict(model.records[task, sample["doc_id"]])
            entry.pop("key", None)
            identity = {"task": task, "doc_id": sample["doc_id"]}
            if "error" in entry:
                failures.append({**identity, **{name: entry[name] for name in ("error", "final") if name in entry}})
            samples.append({**identity, "score": dataset.sample_score(sample), **entry})
    if samples and len(failures) == len(samples):
        raise UserError(f"{dataset.name}: no question could be answered; the first: {failures[0]['error']}")
    return Evaluation(dataset.score(outcome["results"], samples), samples, failures)


def question(dataset: str, model_name: str, number: int, task: str | None = None) -> tuple[Any, str]:
    """The media and the prompt of one question of a data set's task. task: its name, the first one by default."""
    tasks = load_tasks(pick(DATASETS, dataset, "dataset"), model_name)[1]
    chosen = next(one for one in tasks if task in (None, one.config.task))
    doc = chosen.eval_docs[number]
    return chosen.doc_to_visual(doc)[0], chosen.doc_to_text(doc)


@cache
def load_tasks(dataset: Dataset, model_name: str) -> tuple[TaskManager, list[Task]]:
    """A data set's tasks with the prompts lmms-eval has for the model. Loading takes seconds, so runs share it."""
    from datasets.utils.logging import set_verbosity_error
    from lmms_eval.tasks import TaskManager, get_task_dict

    set_verbosity_error()  # else two lines a task say that its data were found in the cache
    # only this data set's folder: reading all of lmms-eval's takes thirteen seconds
    manager = TaskManager("ERROR", include_path=[str(dataset.folder)], include_defaults=False, model_name=model_name)
    return manager, list(_leaves(get_task_dict(list(dataset.tasks), manager, "simple")))


def _leaves(tasks: dict) -> Iterator[Task]:
    """The task objects of a (possibly nested) task dictionary."""
    for task in tasks.values():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
