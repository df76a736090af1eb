"""The design space of Focus: cycles beside accuracy, of our traces and as published (paper, Figure 10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from focuslib.errors import pick
from focuslib.hardware.accelerators import focus_design
from focuslib.hardware.paper import published_csv
from focuslib.hardware.sources import read_source
from focuslib.hardware.tables import simulator_row
from focuslib.hardware.workload import Workload, run
from focuslib.prefill.ops import DecoderShape


def sweep_table(folder: str | Path, sweep: str, shapes: Mapping[str, DecoderShape] | None = None) -> pd.DataFrame:
    """Cycles beside accuracy at each point of a sweep that a results folder has (paper, Figure 10).

    sweep: m_tile_size, vector_size or block_size. Reads <sweep>_dse/*.pth, each at its own design point, and
    dse_*_accuracy.csv. Empty without traces: they are not committed, so run the dse notebook first.
    """
    folder = Path(folder)
    accuracy_file = folder / pick(_SWEEPS, sweep, "sweep")
    if not accuracy_file.is_file():
        return pd.DataFrame()
    rows, points = [], pd.read_csv(accuracy_file, dtype={"block_size": str})
    # the table does not say whose accuracy a row is: with several models it is of none
    points.loc[points.duplicated(sweep, keep=False), "accuracy"] = float("nan")
    for settings in points.drop_duplicates(sweep).to_dict("records"):
        value = str(settings[sweep])
        for path in sorted((folder / f"{sweep}_dse").glob(f"*_{value}.pth")):
            workload = _sweep_workload(path, value, shapes or {})
            design = focus_design(m_tile=int(settings["m_tile_size"]), vector_size=int(settings["vector_size"]))
            row = simulator_row(workload, design, run(workload, design))
            rows.append({"sweep": sweep, "value": value, "accuracy": settings["accuracy"], **row})
    return pd.DataFrame(rows)


_SWEEPS = {
    "m_tile_size": "dse_a_m_tile_accuracy.csv",
    "vector_size": "dse_b_vector_accuracy.csv",
    "block_size": "dse_c_block_accuracy.csv",
}


def _sweep_workload(path: Path, value: str, shapes: Mapping[str, DecoderShape]) -> Workload:
    base = read_source(path, shapes=shapes)[0]
    return replace(base, dataset=base.dataset.removesuffix(f"_{value}"))


def published_sweep(folder: str | Path, sweep: str) -> pd.DataFrame:
    """The authors' sweep, with accuracy where they give it: value, total_cycles, accuracy.

    sweep: as in `sweep_table`, or num_scatter. Their vector sweep is of one product (layer 9, o_proj) only.
    """
    files = {
        "m_tile_size": "dse_a_m_tile_size.csv",
        "vector_size": "dse_b_vector_size.csv",
        "block_size": "dse_c_block_size.csv",
        "num_scatter": "dse_d_num_scatter_accumulator.csv",
    }
    table = published_csv(Path(folder) / "simulator" / pick(files, sweep, "sweep"))
    out = pd.DataFrame({
        "value": table[sweep].astype(str),
        "total_cycles": table["layer_cycles" if sweep == "vector_size" else "total_cycles"],
        "basis": "published",
    })  # fmt: skip
    if sweep in _SWEEPS:
        accuracy = published_csv(Path(folder) / _SWEEPS[sweep])
        out["accuracy"] = out["value"].map(dict(zip(accuracy[sweep].astype(str), accuracy["accuracy"], strict=True)))
    return out
