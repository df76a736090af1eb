"""What a profile needs before it starts: weights, data sets, videos, a GPU, and about how many hours. No network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from focuslib.errors import UserError, pick
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.sources import sources
from focuslib.experiments.paper import plan
from focuslib.experiments.params import EXPERIMENTS
from focuslib.experiments.published import PUBLISHED_GPU_GB, is_published, published_cost, published_hours
from focuslib.models import MODELS
from focuslib.models.checkpoint import check_shards, read_json, resolve_folder
from focuslib.models.registry import adapter_of, named
from focuslib.paths import params_folder

WEIGHTS_GB = 20  # a 7B model in bfloat16 and room for a short prompt


@dataclass
class Pair:
    """A (model, data set) pair of a profile. Each part is "there" or says what is missing, in a line with the fix.

    hours: method → hours of the questions asked, as published or (estimated) by the paper's hours a question and visual
    token; empty where neither is known.
    """

    model: str
    dataset: str
    weights: str = "there"
    data: str = "there"
    device: str = "there"
    experiments: list[str] = field(default_factory=list)
    hours: dict[str, float] = field(default_factory=dict)
    estimated: bool = False

    @property
    def missing(self) -> list[str]:
        """One line for each part that is missing."""
        return [part for part in (self.weights, self.data, self.device) if part != "there"]


def check_profile(profile: str) -> list[Pair]:
    """All pairs of a profile's experiments, in order. Raises UserError for faulty parameter files."""
    folder = params_folder() / profile
    experiments = [name for name in EXPERIMENTS if (folder / f"{name}.yaml").is_file()]
    if not experiments:
        raise UserError(f"{folder}: no such profile")
    weights_of, data_of, device_of = cache(weights), cache(data), cache(device)  # a model or data set is in many cells
    pairs: dict[tuple[str, str], Pair] = {}
    for experiment in experiments:
        for cell in plan(experiment, profile)[1]:
            key = (cell.model, cell.dataset)
            if key not in pairs:
                parts = weights_of(cell.model, cell.checkpoint), data_of(cell.dataset), device_of(cell.device)
                pairs[key] = Pair(*key, *parts)
            pair = pairs[key]
            if experiment not in pair.experiments:
                pair.experiments.append(experiment)
            if (hours := published_hours(cell)) is not None:  # experiments share cells, and one may ask fewer questions
                method = " ".join(filter(None, (cell.quantization, cell.method)))
                pair.hours[method] = max(hours, pair.hours.get(method, 0.0))
                pair.estimated = not is_published(cell)
    return list(pairs.values())


def weights(model: str, checkpoint: str | None = None) -> str:
    """Whether a model's checkpoint is whole and of its family; reads headers only."""
    adapter = adapter_of(model)
    try:
        folder = resolve_folder(checkpoint or adapter.checkpoint)
        check_shards(folder)
        adapter.architecture(folder, read_json(folder / "config.json"))
    except UserError as error:
        line, command = str(error), f"hf download {checkpoint or adapter.checkpoint}"
        return line if checkpoint or command in line else f"{line}: {command}"
    return "there"


def data(dataset: str) -> str:
    """Whether a data set and every video it names are there."""
    found = list(sources(DATASETS[dataset]))
    fetch = f"focus fetch {dataset}"
    for source in found:
        if what := source.missing():
            return f"{dataset}: {what}; get it where there is a network: {fetch}"
    if not any(source.videos for source in found):
        return "there"
    wanted = set(_videos(dataset))
    lost = sorted(path for path in wanted if not path.exists())
    if lost:
        count = f"{len(lost)} of {len(wanted)} videos missing, such as {lost[0]}"
        return f"{dataset}: {count}; try {fetch}, or unpack them there"
    return "there"


def device(name: str) -> str:
    """Whether the device is there, with memory for a 7B model."""
    if not name.startswith("cuda"):
        return "there"
    if not torch.cuda.is_available():
        return f"{name}: no CUDA GPU here; the published runs had one of {PUBLISHED_GPU_GB} GB"
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info(torch.device(name)))
    if free < WEIGHTS_GB:
        needs = f"a 7B model takes {WEIGHTS_GB}, the published runs had {PUBLISHED_GPU_GB}"
        return f"{name}: {free:.0f} of {total:.0f} GB free; {needs}"
    return "there"


def fetch(name: str) -> str:
    """Download a model's checkpoint or a data set with its videos, as the run reads them; returns what is there now."""
    if name in MODELS or "/" in name:  # a checkpoint by its hub id
        model, checkpoint = named(name)
        return f"{model}: {resolve_folder(checkpoint or MODELS[name].checkpoint, download=True)}"
    dataset = pick(DATASETS, name, "model or data set")
    from focuslib.evaluation.lmms import load_tasks

    try:
        load_tasks(dataset, "dense")
    except Exception as error:  # whatever the hub's clients raise, retries and all
        why = " ".join(str(error).split())
        raise UserError(f"{name}: could not be downloaded ({type(error).__name__}: {why})") from error
    return f"{name}: {', '.join(str(source.cache()) for source in sources(dataset))}"


def table(pairs: list[Pair]) -> pd.DataFrame:
    """One row a pair: what is there, and the published hours of each method."""
    rows = [
        {
            "Model": pair.model,
            "Dataset": pair.dataset,
            **{
                name: "there" if getattr(pair, name) == "there" else "MISSING" for name in ("weights", "data", "device")
            },
            "experiments": " ".join(pair.experiments),
            "published hours": ("estimated: " if pair.estimated else "")
            + (", ".join(f"{method} {hours:.1f}" for method, hours in pair.hours.items()) or "not published"),
        }
        for pair in pairs
    ]
    return pd.DataFrame(rows)


def cost(pairs: list[Pair]) -> str:
    """The published hours of the whole profile, in a line."""
    hours = sum(sum(pair.hours.values()) for pair in pairs)
    if not hours:
        return "no cost is published for this profile"
    others = published_cost()["others"]
    beside = ", ".join(f"{name} {hours:g} h" for name, hours in others.items())
    if any(pair.estimated for pair in pairs):
        basis = "estimated by the paper's hours a question and visual token"
        return f"{basis}, on one {PUBLISHED_GPU_GB} GB GPU: accuracy {hours:.0f} h"
    return f"published cost on one {PUBLISHED_GPU_GB} GB GPU: accuracy {hours:.0f} h; all of the paper's {beside}"


def _videos(dataset: str) -> Iterator[Path]:
    """The videos that a data set's questions are about, as its own tasks name them."""
    from loguru import logger

    from focuslib.evaluation.lmms import load_tasks  # imports lmms-eval

    logger.disable("")  # a task logs each missing video
    try:
        for task in load_tasks(DATASETS[dataset], "dense")[1]:
            for doc in task.eval_docs:
                try:
                    yield Path(task.doc_to_visual(doc)[0])
                except SystemExit as error:  # how some tasks say that it is missing
                    yield Path(str(error).partition(":")[2].partition(" does not exist")[0])
    finally:
        logger.enable("")
