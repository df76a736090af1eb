"""Our models as one of stock lmms-eval's model classes, and its tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from typing import Any

import lmms_eval.api.task
import torch
from datasets.utils.logging import set_verbosity_error
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import Task
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from tqdm import tqdm

from focuslib.errors import InputError, UserError, pick
from focuslib.evaluation.datasets import DATASETS, Dataset
from focuslib.evaluation.journal import Journal, lasting
from focuslib.evaluation.left import pack_left
from focuslib.evaluation.settings import method_settings
from focuslib.files import digest
from focuslib.methods import Method
from focuslib.methods.settings import make_method, typed_settings
from focuslib.models import VLM, load_vlm
from focuslib.models.media import blank, readable_images
from focuslib.prefill.ops import SITES, dense_operations
from focuslib.prefill.record import PrefillRecord, Run

# Generation arguments of the tasks that a greedy decoder understands; the others (temperature, beams) are left out.
_GENERATION = ("max_new_tokens",)


class FocusLmms(lmms):
    """A loaded VLM under one method, as lmms-eval sees it.

    From the command line: `lmms-eval --model focuslib --model_args model=tiny_onevision,method=focus,m_tile=512 …`.
    A method by name has its settings of params/methods.yaml for the model and each task's data set, as in `focus run`;
    every further argument replaces one of them; lists are written 1:3:5.
    blank: grey pictures are shown instead of the media, to see what the words alone tell.
    known: (task, doc_id) → entry of answers that are not asked for.
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
        frames: int | str | None = None,
        fps: float | str | None = None,
        journal: Journal | None = None,
        known: dict[tuple[str, int], dict[str, Any]] | None = None,
        save_trace: Callable[[str, int, Run], None] | None = None,
        blank: bool = False,
        **settings: Any,
    ):
        super().__init__()
        if int(batch_size) != 1:
            raise UserError(f"batch_size is {batch_size}; methods act on one sequence at a time, use batch_size 1")
        settings.pop("max_batch_size", None)
        seen = {"frames": frames and int(frames), "fps": fps and float(fps)}
        self.vlm = model if isinstance(model, VLM) else load_vlm(model, pretrained, device=device, dtype=dtype, **seen)
        # by name, a method has its settings for each task's data set; here only what was typed is checked
        self.named = None if isinstance(method, Method) else (method, typed_settings(method, settings))
        self.method = method if isinstance(method, Method) else self.method_for("")
        self.journal = journal
        self.known = known or {}
        self.save_trace = save_trace
        self.blank = blank
        self.records: dict[tuple[str, int], dict[str, Any]] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> FocusLmms:
        """As the stock command makes it; a user's mistake ends the command with one line."""
        with _ending_in_one_line():
            model = super().create_from_arg_string(arg_string, additional_config)
        model.generate_until = _ending_in_one_line()(model.generate_until)
        return model

    def __repr__(self) -> str:
        return f"{self.vlm.name} under {self.method}"

    def method_for(self, task: str) -> Method:
        """The method with its settings for a task's data set."""
        if self.named is None:
            return self.method
        name, settings = self.named
        return make_method(
            name, {**method_settings(name, self.vlm.name, dataset_of(task), adapter=type(self.vlm).name), **settings}
        )

    @property
    def device(self) -> torch.device:
        return self.vlm.device

    def clean(self) -> None:
        """Keep the model: the next method uses it too."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer every request; those in the journal are not run again."""
        answers: list[str] = []
        bar = tqdm(total=len(requests), desc=f"{self.vlm.name} {self.method.name}", unit="question", leave=False)
        with bar:
            for entry in self.entries(requests):
                self.records[entry["task"], entry["doc_id"]] = entry
                answers.append(entry["answer"])
                bar.update()
        return answers

    def entries(self, requests: list[Instance]) -> Iterator[dict[str, Any]]:
        """What is known of each request, as a journal keeps it: key, task, doc_id, answer, the numbers of `summary`."""
        for name, group in groupby(requests, lambda request: request.args[4]):
            method = self.method_for(name)
            asked = [*self.vlm.identity(), repr(method), *(["blank"] if self.blank else [])]
            with method(self.vlm, trace=self.save_trace is not None) as run:
                for request in group:
                    context, generation, _, doc_id, task, split = request.args
                    key = digest([*asked, task, split, doc_id, context, generation])
                    entry = self.journal.entries.get(key) if self.journal else None
                    entry = entry or self.known.get((task, doc_id))
                    if entry is None:
                        answer = self._answer(run, *request.args)
                        entry = {"key": key, "task": task, "doc_id": doc_id, **answer}
                        if self.journal and lasting(entry):
                            self.journal.add(key, entry)
                    yield entry

    def _answer(self, run: Run, context: str, generation: dict, to_visual, doc_id: int, task: str, split: str) -> dict:
        """One answer with what the method did; a sample that cannot be read or run is an entry with an error."""
        try:
            with readable_images(f"{task} {doc_id}"):
                visuals = to_visual(self.task_dict[task][split][doc_id]) or []
            if not visuals:
                raise InputError("no image or video in this question; methods act on visual tokens")
            if len(visuals) > 1 and not self.vlm.several_media:
                raise InputError(f"{len(visuals)} images or videos in this question; {self.vlm.name} takes one")
            if self.blank:
                visuals = [blank(self.vlm.clip(one)) for one in visuals]
            inputs = self.vlm.prepare(visuals if len(visuals) > 1 else visuals[0], context)
        except (Exception, SystemExit) as error:  # the latter is how some stock tasks report a missing video
            return _failure(task, doc_id, error)
        start = time.perf_counter()
        try:
            ids = self.vlm.generate_ids(inputs, **{key: generation[key] for key in _GENERATION if key in generation})
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, InputError):
                raise  # settings that fit no question
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what an out-of-memory question took
            return _failure(task, doc_id, error)
        seconds = time.perf_counter() - start
        answer = self.vlm.decode(ids)
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


class AnsweredLmms(lmms):
    """What lmms-eval scores where all answers are there already: no model is loaded.

    records: (task, doc_id) → the entry of its answer (see FocusLmms.entries).
    """

    is_simple = True

    def __init__(self, records: dict[tuple[str, int], dict[str, Any]]):
        super().__init__()
        self.records = records

    def clean(self) -> None:
        """There is nothing to free."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers. Raises UserError if one is missing."""
        asked = [(request.args[4], request.args[3]) for request in requests]
        if missing := [question for question in asked if question not in self.records]:
            task, doc_id = missing[0]
            raise UserError(f"{len(missing)} of {len(asked)} questions have no answer, the first is {task} {doc_id}")
        return [self.records[question]["answer"] for question in asked]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("focuslib generates answers; tasks that score log-likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("focuslib answers one round; multi-round tasks are not supported")


@contextmanager
def _ending_in_one_line() -> Iterator[None]:
    """End the process with one line on a user's mistake: lmms-eval would show a traceback and exit with status 0."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"focuslib: {error}") from error


def dataset_of(task: str) -> str:
    """The data set that a task belongs to, "" if it is none of ours."""
    for dataset in DATASETS.values():
        if task in dataset.tasks or (dataset.name == "mvbench" and task.startswith("mvbench_")):
            return dataset.name
    return ""


def _failure(task: str, doc_id: int, error: BaseException) -> dict[str, Any]:
    """The entry of a question that could not be asked, with the reason in one line.

    final: the method or the model cannot take it, so that asking again is in vain.
    """
    reason = one_line(error)
    logger.warning(f"{task} {doc_id}: {reason}")
    return {"answer": "", "error": reason} | ({"final": True} if isinstance(error, InputError) else {})


def one_line(error: BaseException) -> str:
    """What an error says, in one line, with its type where it was not meant for a user."""
    what = " ".join(str(error).split())
    return what if isinstance(error, (UserError, SystemExit)) else f"{type(error).__name__}: {what}"


def summary(method: Any, record: PrefillRecord) -> dict[str, Any]:
    """The numbers of one prefill that go into results: plain values only."""
    grid, counts = record.grid, record.counts
    numbers = {
        "visual_tokens": grid.length,
        "num_frames": grid.num_frames,
        "computation_sparsity": record.computation_sparsity,
        "table_two_sparsity": method.table_two_sparsity(record),
        "dense_operations": dense_operations(record.shape, grid.length),
        "retained": record.retained,
        "stats": record.stats,
    }
    if record.kept:
        numbers["left"] = pack_left(record.left, grid.length)
    if counts.layers:
        numbers["site_sparsity"] = {
            site: [layer[site].sparsity(grid.length) for layer in counts.layers] for site in SITES
        }
        numbers["computed_vectors"] = sum(
            grid.length * site.vectors - site.zero - site.similar for layer in counts.layers for site in layer.values()
        )
        numbers["weighted_sparsity"] = counts.weighted_sparsity(record.shape)
    return numbers


def question(dataset: str, model_name: str, number: int, task: str | None = None) -> tuple[Any, str]:
    """The media and the prompt of one question of a data set's task. task: its name, the first one by default."""
    tasks = load_tasks(pick(DATASETS, dataset, "dataset"), model_name)[1]
    chosen = next(one for one in tasks if task in (None, one.config.task))
    doc = chosen.eval_docs[number]
    return chosen.doc_to_visual(doc)[0], chosen.doc_to_text(doc)


@cache
def load_tasks(dataset: Dataset, model_name: str) -> tuple[TaskManager, list[Task]]:
    """A data set's tasks with the prompts lmms-eval has for the model. Loading takes seconds, so runs share it."""
    set_verbosity_error()  # else two lines a task say that its data were found in the cache
    # only this data set's folder: reading all of lmms-eval's takes thirteen seconds
    manager = TaskManager("ERROR", include_path=[str(dataset.folder)], include_defaults=False, model_name=model_name)
    return manager, list(_leaves(get_task_dict(list(dataset.tasks), manager, "simple")))


@cache
def requests(dataset: Dataset, model_name: str, limit: int | None) -> list[Instance]:
    """All that lmms-eval asks of a data set, in its order; limit: the first so many questions of each task."""
    found: list[Instance] = []
    logger.disable("lmms_eval")  # a line a task
    try:
        with without_bars(lmms_eval.api.task):
            for task in load_tasks(dataset, model_name)[1]:
                task.build_all_requests(limit=limit)
                found += task.instances
    finally:
        logger.enable("lmms_eval")
    return found


@contextmanager
def without_bars(*modules: Any) -> Iterator[None]:
    """Keep the bars of some of lmms-eval's modules off the screen: they are of no model's work."""
    shown = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = lambda *args, **options: tqdm(*args, **{**options, "disable": True})
    try:
        yield
    finally:
        for module, own in zip(modules, shown, strict=True):
            module.tqdm = own


def _leaves(tasks: dict) -> Iterator[Task]:
    """The task objects of a (possibly nested) task dictionary."""
    for task in tasks.values():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
