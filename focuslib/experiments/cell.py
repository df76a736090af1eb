"""Cells, the independent pieces of an experiment (model × data set × method × settings), and what decides a result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from focuslib.errors import pick
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.settings import method_settings
from focuslib.evaluation.sources import revisions
from focuslib.experiments.identity import package_versions, source_digest
from focuslib.files import digest
from focuslib.methods.settings import make_method
from focuslib.models.checkpoint import resolve_folder
from focuslib.models.fingerprint import fingerprint
from focuslib.models.registry import adapter_of, named


@dataclass(frozen=True)
class Cell:
    """One independent piece of an experiment.

    kind: "accuracy" scores the method, "matched" does at settings of equal computation sparsity, "ablation" with a part
        of the method switched off, "blank" on grey pictures instead of the media; "sparsity" asks only the first
        questions, "trace" does too and keeps the median sample's trace; "cost" measures a prefill of one question, and
        "view" keeps what a view of one shows.
    settings: every hyper-parameter of the method. limit: questions a task, None for all.
    model: an adapter's name, or what a checkpoint of the adapter hf is called (see models.registry.named).
    checkpoint: a folder or hub id, None for the adapter's published one. quantization: "int8", "int8_llm" or None.
    frames, fps: the most frames of a video that are seen, and how many a second; None: the adapter's own rule.
    sample: keep this sample's trace (its place among the samples) instead of the median's; of a view, the question of
        this number instead of the first.
    """

    kind: str
    model: str
    dataset: str
    method: str
    settings: dict[str, Any] = field(hash=False)
    limit: int | None
    device: str
    dtype: str
    seed: int
    checkpoint: str | None = None
    quantization: str | None = None
    sample: int | None = None
    frames: int | None = None
    fps: float | None = None

    def __str__(self) -> str:
        precision = f" in {self.quantization}" if self.quantization else ""
        return f"{self.kind} {self.model} × {self.dataset} × {self.method}{precision}"

    @property
    def looks(self) -> bool:
        """Whether it is about one question, and has no answers."""
        return self.kind in ("cost", "view")

    def identity(self) -> dict[str, Any]:
        """All that decides the result. Raises UserError if the checkpoint or the data set is unknown or missing."""
        dataset = pick(DATASETS, self.dataset, "dataset")
        source = self.checkpoint or adapter_of(self.model).checkpoint
        return {
            **asdict(self),
            "checkpoint": fingerprint(resolve_folder(source)),
            "data": [dataset.version(), *revisions(dataset)],
            "source": source_digest(*(("explore",) if self.kind == "view" else ())),
            "packages": package_versions(*(("bitsandbytes",) if self.quantization else ())),
        }

    def name(self) -> str:
        """The file name of the cell's result, without its ending."""
        return self.name_of(self.identity())

    def name_of(self, identity: dict[str, Any]) -> str:
        """The name that an identity gives."""
        return f"{self.kind}_{self.model}_{self.dataset}_{self.method}_{digest(identity)}"


def make_cell(
    kind: str, *, model: str, dataset: str, method: str, limit: int | None, device: str, dtype: str, seed: int,
    checkpoint: str | None = None, settings: dict[str, Any] | None = None, quantization: str | None = None,
    sample: int | None = None, frames: int | None = None, fps: float | None = None,
) -> Cell:  # fmt: skip
    """A cell with all names checked. settings: replace those of params/methods.yaml."""
    model, checkpoint = named(model, checkpoint)
    pick(DATASETS, dataset, "dataset")
    tuned = method_settings(method, model, dataset, adapter=adapter_of(model).name if checkpoint else None)
    chosen = make_method(method, {**tuned, **(settings or {})})
    settings = _plain(chosen.settings())
    chosen_for = (settings, limit, device, dtype, seed, checkpoint, quantization, sample, frames, fps)
    return Cell(kind, model, dataset, method, *chosen_for)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON keeps them."""
    return json.loads(json.dumps(settings))
