"""Where workloads come from: a results folder, the published inputs, one trace, or one .pth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from focuslib.errors import UserError
from focuslib.hardware.shapes import KNOWN, shape_of
from focuslib.hardware.traces import read_counts
from focuslib.hardware.workload import Workload, check_counts
from focuslib.prefill.ops import DecoderShape

_META = ("Model", "Dataset", "Sequence length", "Num frames")
_CMC = ("linear_sparsity", "query_sparsity", "attn_score_sparsity")
_IMAGES = ("vqav2", "mme", "mmbench", "tinyimage")


def read_source(
    source: str | Path, *, model: str | None = None, shapes: Mapping[str, DecoderShape] | None = None
) -> list[Workload]:
    """The workloads of a folder, or the one of a trace.

    Parameters
    ----------
    source
        A results folder (meta_data.csv, and where they are adaptiv_sparsity.csv, cmc_sparsity.csv,
        focus_main/<model>_<dataset>.pth, cells/*.trace), the published inputs (the same with focus_settings.csv), or
        one .trace, .pth or counts .json file.
    model
        Of a single trace: the model's name. None: what the file's name begins with.
    shapes
        Decoder dimensions by model, for models that are not known.

    Raises
    ------
    UserError
        If a file or a row is missing, or a trace is of another shape than its row.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path, shapes or {})
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a results folder, a .trace or a .pth")
    return [_single(path, model, shapes or {})]


def is_image(dataset: str) -> bool:
    """Whether a data set is of single images, which CMC does not run on."""
    return dataset.startswith(_IMAGES)


def _single(path: Path, model: str | None, shapes: Mapping[str, DecoderShape]) -> Workload:
    counts, frames = read_counts(path)
    cell = _cell_of(path)
    names = sorted({*KNOWN, *shapes}, key=len, reverse=True)
    model = model or cell.get("model") or next((name for name in names if path.stem.startswith(name)), None)
    if model is None:
        raise UserError(f"{path}: its name does not begin with a known model's ({', '.join(names)}); name the model")
    shape = shapes.get(model) or shape_of(model, cell.get("checkpoint"))
    check_counts(counts, shape, counts.tokens, str(path))
    dataset = cell.get("dataset") or path.stem.removeprefix(model).strip("_")
    return Workload(model, dataset, shape, counts.tokens, frames, trace=counts, source=str(path))


def _folder(folder: Path, shapes: Mapping[str, DecoderShape]) -> list[Workload]:
    meta = _read_csv(folder / "meta_data.csv", _META)
    if meta is None:
        raise UserError(f"{folder / 'meta_data.csv'}: missing; it names each trace's length, run the main experiment")
    adaptiv = _sparsities(folder / "adaptiv_sparsity.csv", ("Sparsity",))
    cmc = _sparsities(folder / "cmc_sparsity.csv", _CMC)
    schedules, native = _schedules(folder / "focus_settings.csv"), _native_traces(folder)
    workloads = []
    for row in meta.to_dict("records"):
        pair = (str(row["Model"]), str(row["Dataset"]))
        tokens, frames = (_positive(row[name], folder / "meta_data.csv", pair) for name in _META[2:])
        cell = native.get(pair, {})
        workloads.append(
            Workload(
                *pair,
                shape=shapes.get(pair[0]) or shape_of(pair[0], cell.get("checkpoint")),
                tokens=tokens,
                frames=frames,
                adaptiv=_row(adaptiv, pair, folder / "adaptiv_sparsity.csv", (None,))[0],
                cmc=_row(cmc, pair, folder / "cmc_sparsity.csv", None) if not is_image(pair[1]) else None,
                schedule=schedules.get(pair),
                trace=_trace_file(folder, pair, cell, len(meta) == 1),
                basis="recomputed here" if schedules else "ours",
                source=str(folder),
            )
        )
    known = {f"{w.model}_{w.dataset}" for w in workloads}
    for path in sorted((folder / "focus_main").glob("*.pth")):
        if path.stem not in known:
            raise UserError(f"{path}: meta_data.csv has no row of it; run the main experiment again, or remove it")
    return workloads


def _row(table: dict | None, pair: tuple[str, str], path: Path, default: Any) -> Any:
    """A pair's row of a table that may not be there; one that is there must have it."""
    if table is None:
        return default
    if pair not in table:
        raise UserError(f"{path}: no row of {pair[0]} × {pair[1]}, which meta_data.csv has; run the baselines again")
    return table[pair]


def _trace_file(folder: Path, pair: tuple[str, str], cell: dict[str, Any], alone: bool) -> Path | None:
    """A pair's trace: the native file of its cell, the simulator's .pth, or the counts of a folder of one pair."""
    places = [folder / "focus_main" / f"{pair[0]}_{pair[1]}{ending}" for ending in (".pth", ".trace")]
    if "path" in cell:
        places.insert(0, cell["path"])
    if alone:
        places.append(folder / "counts.json")
    return next((path for path in places if path.is_file()), None)


def _native_traces(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(model, data set) → its trace cell, with the path of the native file, of the main and the image experiment."""
    found = {}
    for index in (folder / "cells" / f"{name}.index" for name in ("main", "image")):
        for name in json.loads(index.read_text())["cells"] if index.is_file() else []:
            result = folder / "cells" / name
            content = json.loads(result.read_text()) if name.startswith("trace_") and result.is_file() else {}
            if content.get("trace"):
                cell = content["cell"]
                found[cell["model"], cell["dataset"]] = {**cell, "path": result.with_name(content["trace"])}
    return found


def _cell_of(path: Path) -> dict[str, Any]:
    """The cell that a native trace belongs to, from the result beside it; empty without one."""
    result = path.with_suffix(".json")
    if path.suffix != ".trace" or not result.is_file():
        return {}
    return json.loads(result.read_text()).get("cell", {})


def _schedules(path: Path) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
    """Each pair's selected layers and retention, from the published settings."""
    table = _read_csv(path, ("model", "dataset", "selected_layers", "alpha_list"))
    if table is None:
        return {}
    try:
        return {
            (row["model"], row["dataset"]): (json.loads(row["selected_layers"]), json.loads(row["alpha_list"]))
            for row in table.to_dict("records")
        }
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: a list of layers or shares is unreadable ({error}); write [2, 5] or [0.4, 0.3]"
        ) from error


def _sparsities(path: Path, columns: tuple[str, ...]) -> dict[tuple[str, str], tuple[float, ...]] | None:
    table = _read_csv(path, ("Model", "Dataset", *columns))
    if table is None:
        return None
    found = {}
    for row in table.to_dict("records"):
        values = tuple(row[column] for column in columns)
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            raise UserError(f"{path}: a sparsity of {row['Model']} × {row['Dataset']} is not in 0 … 1; run it again")
        found[row["Model"], row["Dataset"]] = values
    return found


def _positive(value: Any, path: Path, pair: tuple[str, str]) -> int:
    try:
        if int(value) == value and value > 0:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{path}: {value!r} of {pair[0]} × {pair[1]} is not a positive whole number; run it again")


def _read_csv(path: Path, columns: tuple[str, ...]) -> pd.DataFrame | None:
    """A table that must have some columns; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV table ({error}); write it again") from error
    if missing := [column for column in columns if column not in table]:
        raise UserError(f"{path}: no column {missing[0]}; it must have {', '.join(columns)}")
    return table
