"""How long a model takes with and without a method, measured the way users ask for it; what `focus measure` runs."""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from focuslib.errors import UserError
from focuslib.evaluation.measure import measure
from focuslib.evaluation.settings import method_settings
from focuslib.files import write_json
from focuslib.kernels.compiled import at_once
from focuslib.methods import Focus, Method
from focuslib.methods.settings import make_method
from focuslib.models import VLM, load_vlm
from focuslib.models.base import Inputs, Media
from focuslib.models.registry import DTYPES
from focuslib.models.shapes import Shape, load_shape

SHAPE = "shape:"  # what a model's name starts with that has random weights and no checkpoint
DECODED = 8  # tokens after the first whose mean is the time a token
QUESTION = "What happens in the video?"


def load_measured(
    model: str, *, checkpoint: str | None = None, layers: int | None = None, device: str = "cpu", dtype: str = "auto",
    frames: int | None = None, fps: float | None = None,
) -> VLM:  # fmt: skip
    """An adapter by name, or `shape:qwen2-7b` (models.shapes), of which `layers` says how many layers it has.

    frames, fps: of a video that an adapter samples.
    """
    if not model.startswith(SHAPE):
        if layers is not None:
            raise UserError(f"layers is for shapes such as {SHAPE}qwen2-7b; {model} has the layers of its checkpoint")
        return load_vlm(model, checkpoint, device=device, dtype=dtype, frames=frames, fps=fps)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return load_shape(model.removeprefix(SHAPE), layers=layers, device=device, dtype=kind)


def methods_for(vlm: VLM, names: list[str], dataset: str = "videomme") -> dict[str, Method]:
    """Methods by name, with the settings of params/methods.yaml for the model and data set.

    The layers of a shape may be fewer than the published model's: Focus then prunes at those that it has.
    """
    made = {name: make_method(name, method_settings(name, vlm.name, dataset, adapter=type(vlm).name)) for name in names}
    layers = vlm.model.config.get_text_config().num_hidden_layers
    for name, method in made.items():
        if isinstance(method, Focus) and isinstance(vlm, Shape):
            pruned = [pair for pair in zip(method.selected_layers, method.retention, strict=True) if pair[0] < layers]
            changed = {"selected_layers": [layer for layer, _ in pruned], "retention": [share for _, share in pruned]}
            made[name] = make_method(name, {**method.settings(), **changed})
    return made


def measure_speed(
    vlm: VLM,
    methods: Mapping[str, Method],
    *,
    clip: Media | None = None,
    question: str = QUESTION,
    frames: int = 16,
    repeats: int = 5,
    decode: bool = True,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time and memory of a prompt under each method, in turns (A B A B …) after one run that warms up and compiles.

    Parameters
    ----------
    vlm: what `load_measured` gives.
    methods: label → method. With "dense" among them, times are also given as multiples of its.
    clip, question: the prompt. A shape has none: `frames` says how many random ones it gets.
    repeats: how often each method is timed.
    decode: also generate: the time to the first token, with the vision tower, and a token after it.
    out: a JSON file to write: {"machine": …, "input": …, "rows": the table}.
    progress: told what is measured, line by line.

    Returns
    -------
    One row a method: method; prefill_ms, first_token_ms and decode_ms, the medians, each with its quartiles
    (prefill_ms_quartiles …); memory_mib, the peak above the loaded model; sparsity, the counted computation that is
    saved (0 … 1); left, the share of visual tokens in the last layer; drops_tokens and emulates: see `explain`.
    """
    say = progress or (lambda line: None)
    prepare = _prompt(vlm, clip, question, frames)
    times: dict[str, list[dict[str, float]]] = {label: [] for label in methods}
    rows = []
    for turn in range(repeats + 1):
        for label, method in methods.items():
            say(f"{label}: {'warming up' if turn == 0 else f'run {turn} of {repeats}'}")
            with at_once(), method(vlm) as run:
                timed = _times(vlm, prepare, decode)
            if turn:
                times[label].append(timed)
            else:
                rows.append(_facts(vlm, label, method, run))
    for row, (label, method) in zip(rows, methods.items(), strict=True):
        for name in times[label][0]:
            values = [timed[name] for timed in times[label]]
            row[name] = float(np.median(values))
            row[f"{name}_quartiles"] = [float(value) for value in np.percentile(values, [25, 75])]
        with method(vlm):
            inputs = prepare()  # inside, for methods that watch the vision tower
            row["memory_mib"] = measure(lambda inputs=inputs: vlm.prefill(inputs), 1, vlm.device)[1]
    dense = next((row["prefill_ms"] for row in rows if row["method"] == "dense"), None)
    for row in rows:
        row["over_dense"] = row["prefill_ms"] / dense if dense else None
    if out is not None:
        grid = prepare().grid
        if grid is None:
            raise UserError("the prompt has no visual tokens; give a video or an image")
        facts = {"model": vlm.name, "dtype": str(vlm.dtype).removeprefix("torch."), "frames": grid.num_frames}
        facts |= {"visual_tokens": grid.length, "layers": vlm.model.config.get_text_config().num_hidden_layers}
        write_json(Path(out), {"machine": machine(vlm.device), "input": {**facts, "repeats": repeats}, "rows": rows})
    return rows


def explain(row: dict[str, Any]) -> str:
    """What a row's time stands for, in words."""
    if row["emulates"] and row["drops_tokens"]:
        return "drops tokens; the vectors it merges are computed all the same: their saving is an accelerator's"
    if row["emulates"]:
        return "emulates an accelerator: everything is computed, so the time is what the emulation costs"
    return "drops tokens: the time saved is real" if row["drops_tokens"] else "computes everything"


def machine(device: torch.device) -> dict[str, Any]:
    """Where a time was measured, and how busy it was."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers")},
    }


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _prompt(vlm: VLM, clip: Media | None, question: str, frames: int) -> Callable[[], Inputs]:
    """What makes the inputs, the vision tower included; a shape's are made once."""
    if isinstance(vlm, Shape):
        if clip is not None:
            raise UserError("a shape has no vision tower and takes no clip; say how many frames")
        inputs = vlm.clip(frames)
        return lambda: inputs
    if clip is None:
        raise UserError(f"{vlm.name}: give a clip to measure with")
    with torch.inference_mode():
        vlm.prepare(clip, question)
    return lambda: vlm.prepare(clip, question)


def _times(vlm: VLM, prepare: Callable[[], Inputs], decode: bool) -> dict[str, float]:
    """Milliseconds of one prefill, and of generating one token and some more."""
    inputs = prepare()
    prefill = _timed(vlm, lambda: vlm.prefill(inputs))
    if prefill < 1000:  # the first of a block also proves the patch, which would count in a short one
        prefill = _timed(vlm, lambda: vlm.prefill(inputs))
    times = {"prefill_ms": prefill}
    if decode:
        times["first_token_ms"] = _timed(vlm, lambda: _generate(vlm, prepare(), 1))
        alone = _timed(vlm, lambda: _generate(vlm, inputs, 1))
        more = _timed(vlm, lambda: _generate(vlm, inputs, 1 + DECODED))
        times["decode_ms"] = (more - alone) / DECODED
    return times


def _generate(vlm: VLM, inputs: Inputs, tokens: int) -> None:
    vlm.generate_ids(inputs, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)


def _timed(vlm: VLM, call: Callable[[], object]) -> float:
    """Milliseconds of a call, until the device is done."""
    if vlm.device.type == "cuda":
        torch.cuda.synchronize(vlm.device)
    start = time.perf_counter()
    call()
    if vlm.device.type == "cuda":
        torch.cuda.synchronize(vlm.device)
    return 1000 * (time.perf_counter() - start)


def _facts(vlm: VLM, label: str, method: Method, run) -> dict[str, Any]:
    """What does not change from run to run."""
    record = run.prefills[0]
    return {
        "method": label,
        "settings": method.settings(),
        "visual_tokens": record.grid.length,
        "sparsity": record.computation_sparsity,
        "left": record.retained[-1] / record.grid.length,
        "drops_tokens": record.retained[-1] < record.grid.length,
        "emulates": method.emulates,
    }
