"""The speed notebook's measurement: time and memory of every method on one question of each data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.sources import require
from focuslib.evaluation.speed import load_measured, machine, measure_speed, methods_for
from focuslib.experiments.paper import plan, results_folder
from focuslib.experiments.single import first_question
from focuslib.experiments.store import write_status
from focuslib.files import write_json
from focuslib.models import VLM
from focuslib.paths import project_root, shown

FILE = "speed.json"


@dataclass
class SpeedStudy:
    """What was measured. machine: where. rows: one a model, data set and method (see evaluation.speed.measure_speed).

    missing: a line for each model or data set that could not be measured. gpu: the records in results/gpu, by name.
    """

    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    missing: list[str]
    gpu: dict[str, dict[str, Any]]


def study_speed(profile: str, changes: dict[str, Any] | None = None) -> SpeedStudy:
    """Measure as params/<profile>/speed.yaml says, and write results/<profile>/speed.json.

    Measured anew each time that the notebook is executed: a time is a fact about one machine at one moment, not a
    result that another run could take over. So there are no cells, nothing is looked up, and the file of an earlier run
    is replaced only when all of this one is measured. `make verify` compares tables (*.csv), so no times. The notebook
    runs last, after the workers of the others have ended; load beside it is in the record.

    Raises UserError for a mistake in the parameters. A model or data set that is not here is a line in `missing`.
    """
    params, _ = plan("speed", profile, changes)
    folder = results_folder(params["results"])
    device = torch.device(params["device"])
    rows, missing = [], []
    with _threads(params["threads"]):
        where = machine(device) if device.type != "cuda" or torch.cuda.is_available() else {}
        for model in params["models"]:
            try:
                checkpoint = (params["checkpoints"] or {}).get(model)
                vlm = load_measured(model, checkpoint=checkpoint, device=params["device"], dtype=params["dtype"])
            except UserError as error:
                missing.append(f"{model}: {error}")
                continue
            for dataset in params["datasets"]:
                try:
                    rows += _measured(vlm, dataset, params)
                except UserError as error:
                    missing.append(f"{model} on {dataset}: {error}")
    write_json(folder / FILE, {"machine": where, "repeats": params["repeats"], "rows": rows, "missing": missing})
    text = f"{len(rows)} rows measured: {shown(folder / FILE)}"
    write_status(folder, "speed", [], not missing, "\n".join([text, *missing]))
    return SpeedStudy(where, rows, missing, gpu_records(project_root() / "results" / "gpu"))


def gpu_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What `python -m benchmarks.gpu` left in a folder, by file name; dry runs on a CPU are no measurement."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: record for name, record in found.items() if not record["dry_run"]}


def _measured(vlm: VLM, dataset: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one model and data set."""
    require(DATASETS[dataset])
    media, prompt = first_question(vlm, dataset)
    methods = methods_for(vlm, params["methods"], dataset)
    rows = measure_speed(vlm, methods, clip=media, question=prompt, repeats=params["repeats"])
    return [{"model": vlm.name, "dataset": dataset, **row} for row in rows]


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
