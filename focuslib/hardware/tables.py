"""The simulator's own tables: one row a prefill and accelerator, its column names, its file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from focuslib.hardware.accelerators import DENSE, FOCUS, SEC_ONLY, Accelerator
from focuslib.hardware.cost import Cost
from focuslib.hardware.energy import energy
from focuslib.hardware.workload import Workload

COLUMNS = (
    "model", "dataset", "accelerator", "execution_time", "total_cycles", "total_compute_cycles", "total_stall_cycles",
    "total_energy", "total_dram_access", "dram_bandwidth", "dense_ops", "num_ops", "mem_counter_total",
    "total_activation", "total_compression_ratio", "dram_energy", "sram_energy", "core_energy",
)  # fmt: skip
# accelerator → its file of the simulator
FILES = {
    "dense": "main_dense.csv",
    "adaptiv": "main_adaptiv.csv",
    "cmc": "main_cmc.csv",
    "focus": "main_focus.csv",
    "focus_sec_only": "main_focus_SEC_only.csv",
}
_SWEEP_FILES = {"m_tile_size": "dse_a_m_tile_size.csv", "num_scatter": "dse_d_num_scatter_accumulator.csv"}
BUFFER_NOTE = (
    "buffers of another size than the published one need CACTI, which is not part of this: "
    "their sram_energy, and so total_energy, is left out"
)


def simulator_row(workload: Workload, design: Accelerator, cost: Cost) -> dict[str, Any]:
    """A row with the simulator's columns, and after them the design and where the numbers are from.

    Cycles; seconds; mJ; bytes, and bytes a compute cycle (dram_bandwidth). The dense array's operations stay 0, as
    published. total_compression_ratio: of Focus only.
    """
    used, compute, dram = energy(cost, design), cost.total("compute"), cost.total("dram")
    focus = design.name in (FOCUS.name, SEC_ONLY.name)
    dense = design.name == DENSE.name
    return {
        "model": workload.model,
        "dataset": workload.dataset,
        "accelerator": design.name,
        "execution_time": cost.seconds,
        "total_cycles": cost.cycles,
        "total_compute_cycles": compute,
        "total_stall_cycles": cost.total("stall"),
        "total_energy": used.total,
        "total_dram_access": dram,
        "dram_bandwidth": dram / compute if compute else float("nan"),
        "dense_ops": 0 if dense else cost.dense_operations,
        "num_ops": 0 if dense else cost.total("operations"),
        "mem_counter_total": "mem_counter",
        "total_activation": int(cost.total("activation")),
        "total_compression_ratio": cost.compression if focus else float("nan"),
        "dram_energy": used.dram,
        "sram_energy": used.buffer,
        "core_energy": used.core,
        "m_tile_size": design.m_tile,
        "vector_size": design.vector_size if focus else float("nan"),
        "num_scatter": design.scatters if focus else float("nan"),
        "tokens": workload.tokens,
        "basis": workload.basis,
    }


def write_simulator_csvs(table: pd.DataFrame, folder: str | Path, breakdown: pd.DataFrame | None = None) -> list[Path]:
    """Write main_<accelerator>.csv with the simulator's names, columns and forms; returns the files.

    A sweep of one size goes to the simulator's file of that sweep; several sizes are columns of main_focus.csv.
    table: of study.hardware_table. breakdown: also write detailed_power_area_breakdown.csv (energy.breakdown_table).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for accelerator, rows in table.groupby("accelerator", sort=False):
        path, extra = FILES[accelerator], []
        if accelerator in (FOCUS.name, SEC_ONLY.name):
            path, extra = _sweep_file(path, rows)
        rows = rows[[*COLUMNS, *extra]].copy()
        if accelerator in (FOCUS.name, SEC_ONLY.name):
            rows["accelerator"] = "focus"  # the file's name tells SEC alone
            rows["total_compression_ratio"] = rows["total_compression_ratio"].map("tensor({:.4f})".format)
        else:
            rows = rows.drop(columns="total_compression_ratio")
        written.append(write_csv(rows, folder / path))
    if breakdown is not None:
        written.append(write_csv(breakdown, folder / "detailed_power_area_breakdown.csv"))
    return written


def _sweep_file(path: str, rows: pd.DataFrame) -> tuple[str, list[str]]:
    """The file of Focus's rows, and the columns that tell its design points apart."""
    varied = [name for name in ("m_tile_size", "vector_size", "num_scatter") if rows[name].nunique() > 1]
    if len(varied) == 1 and path == FILES[FOCUS.name]:
        path = _SWEEP_FILES.get(varied[0], path)
    return path, varied


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write a table atomically."""
    partial = path.with_name(path.name + ".partial")
    table.to_csv(partial, index=False)
    partial.replace(path)
    return path


def brief(table: pd.DataFrame) -> pd.DataFrame:
    """A table of study.hardware_table for the eye: time, energy and traffic in common units, and what was varied.

    Speed-up: over the dense array, where the table has it.
    """
    pairs = pd.MultiIndex.from_frame(table[["model", "dataset"]])
    dense = table.loc[table["accelerator"] == DENSE.name, "total_cycles"]
    dense = dict(zip(pairs[table["accelerator"] == DENSE.name], dense, strict=True))
    out = table[["model", "dataset", "accelerator", "tokens"]].copy()
    for name in ("m_tile_size", "vector_size", "num_scatter"):
        if table.loc[table["accelerator"].isin((FOCUS.name, SEC_ONLY.name)), name].nunique() > 1:
            out[name] = table[name].map("{:.0f}".format, na_action="ignore")
    out["million cycles"] = (table["total_cycles"] / 1e6).map(_short)
    out["ms"] = (1e3 * table["execution_time"]).map(_short)
    if dense:
        out["speed-up"] = table["total_cycles"].rdiv([dense.get(pair) for pair in pairs]).map("{:.2f}".format)
    out["mJ"] = table["total_energy"].map(_short, na_action="ignore")
    out["DRAM MB"] = (table["total_dram_access"] / 1e6).map(_short)
    out["basis"] = table["basis"]
    return out


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
