"""The paper's headline: baselines recomputed from published lengths and sparsities, beside the authors' own results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from focuslib.errors import UserError
from focuslib.hardware.study import hardware_table
from focuslib.hardware.tables import FILES

VIDEOS = ("videomme", "mlvu", "mvbench")
IMAGES = ("vqav2", "mme", "mmbench")


def published_table(folder: str | Path) -> pd.DataFrame:
    """The authors' own rows, of every accelerator and of the GPU: simulator/*.csv of the published inputs."""
    simulator = Path(folder) / "simulator"
    parts = []
    for name, file in FILES.items():
        part = published_csv(simulator / file)
        part["accelerator"] = name
        parts.append(part.drop(columns="total_compression_ratio", errors="ignore"))
    gpu = published_csv(simulator / "figure9_gpu.csv")
    gpu = gpu.rename(columns={"Model": "model", "Dataset": "dataset", "Method": "accelerator"})
    gpu["total_energy"] = gpu["core_energy"] + gpu["sram_energy"] + gpu["dram_energy"]
    return pd.concat([*parts, gpu], ignore_index=True).assign(basis="published")


def published_csv(path: Path) -> pd.DataFrame:
    """One of the published tables. Raises UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path}: the published results are missing; take them from the project's repository")
    return pd.read_csv(path)


def comparison(published: str | Path, datasets: Sequence[str] = VIDEOS) -> pd.DataFrame:
    """Figure 9's rows: baselines recomputed here, full Focus and the GPU as published.

    datasets: VIDEOS, the nine cells of the headline, or IMAGES (Table V; without GPU, CMC and SEC alone).
    """
    names = ["dense", "adaptiv", "cmc", "focus_sec_only"] if "videomme" in datasets else ["dense", "adaptiv"]
    theirs = published_table(published)
    theirs = theirs[~theirs["accelerator"].isin(["dense", "adaptiv", "cmc", "focus_sec_only"])]
    table = pd.concat([hardware_table(published, names), theirs], ignore_index=True)
    return table[table["dataset"].isin(datasets)].reset_index(drop=True)


def speedups(table: pd.DataFrame, baseline: str = "dense") -> pd.DataFrame:
    """Each row's speed-up and energy saving over the baseline's row of the same model and data set."""
    out = table[["model", "dataset", "accelerator", "basis"]].copy()
    for name, column in (("speed-up", "execution_time"), ("energy saving", "total_energy")):
        out[name] = baseline_values(table, column, baseline) / table[column].to_numpy()
    return out


def baseline_values(table: pd.DataFrame, column: str, baseline: str = "dense") -> np.ndarray:
    """For each row, the baseline's value of the same model and data set; nan without one.

    Our rows have our baseline: a run of the paper's models stands beside the paper's own rows of the same names.
    """
    keys = pd.MultiIndex.from_arrays([table["model"], table["dataset"], table["basis"] == "ours"])
    is_base = (table["accelerator"] == baseline).to_numpy()
    return pd.Series(table[column].to_numpy()[is_base], keys[is_base]).reindex(keys).to_numpy()


def geometric_means(table: pd.DataFrame, of: str = "focus") -> pd.DataFrame:
    """The headline: geometric means over cells of each accelerator's time and energy over those of one.

    Cells: how many that is. Energy is nan where an accelerator's is not known.
    """
    pairs = table.set_index(["model", "dataset"])
    focus = pairs[pairs["accelerator"] == of]
    rows = []
    for name in table["accelerator"].unique():
        if name == of:
            continue
        both = pairs[pairs["accelerator"] == name]
        both = both.merge(focus, left_index=True, right_index=True, suffixes=("", "_of"))
        mean = {
            column: np.exp(np.log(both[column] / both[f"{column}_of"]).mean(skipna=False))
            for column in ("execution_time", "total_energy")
        }
        basis = f"{both['basis'].iloc[0]} / {both['basis_of'].iloc[0]}" if len(both) else ""
        rows.append({
            "Over": name, "Speed-up": mean["execution_time"], "Energy saving": mean["total_energy"],
            "Cells": len(both), "Basis": basis,
        })  # fmt: skip
    return pd.DataFrame(rows)


def int8_table(published: str | Path) -> pd.DataFrame:
    """Focus in INT8 beside FP16 (Table IV): cycles, DRAM bytes and accuracies, all published."""
    simulator = Path(published) / "simulator"
    columns = ["model", "dataset", "total_cycles", "total_dram_access"]
    both = published_csv(simulator / "main_focus.csv")[columns].merge(
        published_csv(simulator / "int8_focus.csv")[columns], on=columns[:2], suffixes=("", " INT8")
    )
    accuracy = published_csv(Path(published) / "accuracy.csv").rename(columns={"Models": "model", "Dataset": "dataset"})
    both = both.merge(accuracy, on=["model", "dataset"], how="left")
    cycles, cycles_int8 = both["total_cycles"], both["total_cycles INT8"]
    return pd.DataFrame({
        "Model": both["model"], "Dataset": both["dataset"],
        "Score": both["Focus"], "Score INT8": both["INT8_Focus"],
        "Cycles (billion)": cycles / 1e9, "Cycles INT8 (billion)": cycles_int8 / 1e9,
        "More cycles (%)": 100 * (cycles_int8 / cycles - 1),
        "DRAM (GB)": both["total_dram_access"] / 1e9, "DRAM INT8 (GB)": both["total_dram_access INT8"] / 1e9,
        "Basis": "published",
    })  # fmt: skip
