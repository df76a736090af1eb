"""A worker: holds one model, and answers the questions of shards with it."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import whole_groups
from focuslib.evaluation.sources import require
from focuslib.experiments.cell import Cell
from focuslib.experiments.engine import Answer, NodeError, Report
from focuslib.experiments.finish import describe_run
from focuslib.experiments.shards import Model, Shard, model_of
from focuslib.experiments.single import measure_cost, record_view
from focuslib.methods.settings import make_method
from focuslib.models import VLM, load_vlm
from focuslib.models.features import FeatureStore


class Loader:
    """Keeps one model in memory; a checkpoint that could not be loaded is not tried again."""

    def __init__(self):
        self.loaded: tuple[Model, VLM] | None = None
        self.errors: dict[Model, UserError] = {}

    def __call__(self, cell: Cell) -> VLM:
        key = model_of(cell)
        if key in self.errors:
            raise self.errors[key]
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None
            gc.collect()
            try:
                self.loaded = key, load_cell(cell)
                self.loaded[1].store = FeatureStore()  # the next cells ask about the same clips
            except UserError as error:
                self.errors[key] = error.with_traceback(None)  # which would keep what was loaded so far
                raise
        return self.loaded[1]


def load_cell(cell: Cell) -> VLM:
    """The model a cell runs on, as it runs on it."""
    return load_vlm(
        cell.model, cell.checkpoint, device=cell.device, dtype=cell.dtype, quantization=cell.quantization,
        frames=cell.frames, fps=cell.fps,
    )  # fmt: skip


class Worker:
    """Answers shards, one after another. Importing lmms-eval takes ten seconds: once a worker."""

    def __init__(self):
        import focuslib.evaluation.lmms  # noqa: F401  now, while the driver prepares the shards

        self.load = Loader()
        self.checked: set[str] = set()
        self.described: tuple[Model, dict[str, Any]] | None = None

    def answer(self, shard: Shard) -> Iterator[Answer | Report]:
        """Everything that a shard gives (see engine.Work)."""
        self._check(shard)
        start = time.time()
        vlm = self.load(shard.cell)
        if shard.cell.looks:
            content, view = _look(vlm, shard.cell)
        else:
            yield from _answers(vlm, shard)
            content = view = None
        if self.described is None or self.described[0] != shard.model:
            self.described = shard.model, describe_run(vlm, shard.cell)
        yield Report({**self.described[1], "seconds": time.time() - start}, content, view)

    def _check(self, shard: Shard) -> None:
        """Raise NodeError if this node has not what the driver has: an answer from here would be another one."""
        name = shard.cell.name_of(shard.identity)
        if name in self.checked:
            return
        node = platform.node()
        try:
            DATASETS[shard.cell.dataset].prepare()
            require(DATASETS[shard.cell.dataset])
            here = shard.cell.identity()
        except (OSError, UserError) as error:
            raise NodeError(f"{node}: {error}") from None
        if other := [what for what, value in shard.identity.items() if here.get(what) != value]:
            values = ", ".join(f"{what} {here.get(what)} for {shard.identity[what]}" for what in other)
            raise NodeError(f"{node} has another {' and '.join(other)} than the driver ({values}); make them alike")
        self.checked.add(name)


def _answers(vlm: VLM, shard: Shard) -> Iterator[Answer]:
    """The answers of a shard's questions, each as soon as it is there."""
    from focuslib.evaluation.lmms import FocusLmms, load_tasks, requests

    cell, dataset = shard.cell, DATASETS[shard.cell.dataset]
    wanted = set(shard.questions)
    asked = [
        request
        for request in requests(dataset, vlm.name, whole_groups(cell.limit, dataset))
        if (request.args[4], request.args[3]) in wanted
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace"
        keep = (lambda task, doc, run: run.trace.save(file)) if cell.kind == "trace" else None
        model = FocusLmms(vlm, make_method(cell.method, cell.settings), save_trace=keep, blank=cell.kind == "blank")
        model.task_dict.update({task.config.task: task.dataset for task in load_tasks(dataset, vlm.name)[1]})
        for entry in model.entries(asked):
            yield Answer(entry, file.read_bytes() if file.exists() else None)
            file.unlink(missing_ok=True)


def _look(vlm: VLM, cell: Cell) -> tuple[dict[str, Any], bytes | None]:
    """What a cell about one question gives, and the content of its view file."""
    if cell.kind == "cost":
        return {"measured": measure_cost(vlm, cell)}, None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "view.npz"
        record_view(vlm, cell, file)
        return {}, file.read_bytes()
