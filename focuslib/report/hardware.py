"""Figures and tables of the hardware study (paper, Figures 9 to 13 and Tables III to V).

A bar's hatching and a row's Basis say where a number is from: recomputed here (from published lengths and
sparsities), published (the authors' own), or ours (this profile's traces).
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from focuslib.hardware.paper import baseline_values, speedups

HATCHES = {"recomputed here": "", "published": "///", "ours": "..."}
LABELS = {
    "GPU": "GPU", "GPU+FF": "GPU + FrameFusion", "dense": "dense array", "adaptiv": "AdapTiV", "cmc": "CMC",
    "focus_sec_only": "Focus, SEC only", "focus": "Focus",
}  # fmt: skip
_COLORS = dict(zip(LABELS, sns.color_palette("colorblind", len(LABELS)), strict=True))
_SWEEP_TITLES = {
    "m_tile_size": "GEMM m-tile (tokens)", "vector_size": "vector (channels)",
    "block_size": "block (frames × side × side)", "num_scatter": "vectors scattered a cycle",
}  # fmt: skip


def speedup_figure(rows: pd.DataFrame) -> Figure:
    """Figure 9: speed-up and energy saving over the dense array, cell by cell, and their geometric means."""
    names = ["GPU", "GPU+FF", "dense", "adaptiv", "cmc", "focus"]
    table = speedups(rows[rows["accelerator"].isin(names)])
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.5), layout="constrained", sharex=True)
    for axis, column in zip(axes, ("speed-up", "energy saving"), strict=True):
        _bars(axis, _with_means(table, column), column, names)
        axis.set_ylabel(f"{column} (×)")
    _legend(figure, table, names)
    return figure


def ablation_figure(rows: pd.DataFrame) -> Figure:
    """Figure 11: the dense array, Focus with SEC only and full Focus; speed-up over the dense array."""
    names = ["dense", "focus_sec_only", "focus"]
    table = speedups(rows[rows["accelerator"].isin(names)])
    figure, axis = plt.subplots(figsize=(11, 2.8), layout="constrained")
    _bars(axis, _with_means(table, "speed-up"), "speed-up", names)
    axis.set_ylabel("speed-up (×)")
    _legend(figure, table, names)
    return figure


def traffic_figure(rows: pd.DataFrame) -> Figure:
    """Figure 12: DRAM bytes and activation bytes of each accelerator, relative to the dense array's."""
    names = ["dense", "adaptiv", "cmc", "focus"]
    rows = rows[rows["accelerator"].isin(names)]
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.5), layout="constrained", sharex=True)
    for axis, column, label in zip(
        axes, ("total_dram_access", "total_activation"), ("DRAM bytes", "activation bytes"), strict=True
    ):
        table = rows[["model", "dataset", "accelerator", "basis"]].assign(
            value=rows[column].to_numpy() / baseline_values(rows, column)
        )
        _bars(axis, _with_means(table, "value"), "value", names)
        axis.set_ylabel(f"{label}, share of dense")
    _legend(figure, rows, names)
    return figure


def area_power_figure(area: pd.DataFrame) -> Figure:
    """Table III as bars: area and on-chip power of the four accelerators, recomputed here from their components."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for axis, column, unit in zip(axes, ("Area", "On-chip Power"), ("mm²", "mW"), strict=True):
        bars = axis.bar(area["Accelerator"], area[column], color=sns.color_palette("colorblind")[0])
        axis.bar_label(bars, fmt="%.2f" if unit == "mm²" else "%.0f", fontsize=8)
        axis.set_title(f"{column.lower()} ({unit}), recomputed here", fontsize=10)
    return figure


def utilisation_figure(products: dict[tuple[str, str], pd.DataFrame]) -> Figure | None:
    """Figure 13: rows of each concentrated tile, and how much of the array's multipliers they keep busy (ours)."""
    if not products:
        return None
    table = _joined(products)
    linear = table[(table["product"] != "attention") & (table["compute"] > 0)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    sns.ecdfplot(linear, x="tile_rows", hue="dataset", ax=axes[0])
    axes[0].set(xlabel="rows of a tile after concentration", ylabel="share of tiles")
    sns.lineplot(linear, x="layer", y="utilisation", hue="dataset", errorbar=None, ax=axes[1], legend=False)
    axes[1].set(xlabel="layer", ylabel="multipliers in use, linear layers", ylim=(0, 1))
    figure.suptitle("ours", fontsize=10)
    return figure


def time_figure(products: dict[tuple[str, str], pd.DataFrame]) -> Figure | None:
    """Where Focus's time goes: cycles by layer and product, a panel a data set; stalls are pale (ours)."""
    if not products:
        return None
    figure, axes = plt.subplots(1, len(products), figsize=(5 * len(products), 3), layout="constrained", squeeze=False)
    for axis, ((_, dataset), table) in zip(axes[0], products.items(), strict=True):
        bottom = np.zeros(table["layer"].nunique())
        for color, (name, part) in zip(sns.color_palette(), table.groupby("product", sort=False), strict=False):
            for column, alpha in (("compute", 1.0), ("stall", 0.4)):
                label = name if alpha == 1 else None
                axis.bar(part["layer"], part[column], bottom=bottom, color=color, alpha=alpha, label=label)
                bottom = bottom + part[column].to_numpy()
        axis.set(title=f"{dataset}, ours", xlabel="layer", ylabel="cycles")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside upper center", frameon=False)
    return figure


def roofline_figure(products: dict[tuple[str, str], pd.DataFrame], multipliers: int = 1024) -> Figure | None:
    """Multiplications a cycle over multiplications a DRAM byte, a dot a layer and product; its size is the time (ours).

    The model does not bound DRAM's bandwidth: the slanted lines say what bandwidth each dot uses.
    """
    if not products:
        return None
    table = _joined(products).dropna(subset=["intensity", "throughput"])
    table = table[table["operations"] > 0]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    sns.scatterplot(table, x="intensity", y="throughput", hue="product", size="cycles", sizes=(10, 160), ax=axis)
    axis.axhline(multipliers, color="black", linewidth=1)
    spread = np.array([table["intensity"].min() / 2, table["intensity"].max() * 2])
    for bandwidth in (1, 8, 64):
        axis.plot(spread, spread * bandwidth, color="grey", linewidth=0.7, linestyle=":")
        axis.annotate(f"{bandwidth} byte a cycle", (spread[0], spread[0] * bandwidth), fontsize=7, color="grey")
    axis.set(xscale="log", yscale="log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set(xlabel="multiplications a DRAM byte", ylabel="multiplications a cycle")
    axis.set_title(f"ours; the line on top: all {multipliers} multipliers busy", fontsize=10)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def sweep_figure(sweep: str, published: pd.DataFrame, ours: pd.DataFrame) -> Figure:
    """One sweep of Figure 10: cycles beside accuracy, as published and (below, if there are traces) ours."""
    parts = [part for part in (published, ours) if not part.empty]
    figure, axes = plt.subplots(len(parts), 1, figsize=(7, 2.4 * len(parts)), layout="constrained", squeeze=False)
    for axis, part in zip(axes[:, 0], parts, strict=True):
        basis = part["basis"].iloc[0]
        at = np.arange(len(part))
        axis.bar(at, part["total_cycles"], hatch=HATCHES[basis], color="lightgrey", edgecolor="black")
        axis.set_xticks(at, part["value"])
        axis.set(ylabel="cycles", title=basis)
        if "accuracy" in part and part["accuracy"].notna().any():
            beside = axis.twinx()
            beside.plot(at, part["accuracy"], marker="o", color=sns.color_palette("colorblind")[3])
            beside.set_ylabel("score")
    axes[-1, 0].set_xlabel(_SWEEP_TITLES[sweep])
    return figure


def speed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Time, energy and saving over the dense array, a row a cell and accelerator, each with its Basis."""
    gains = speedups(rows)
    return pd.DataFrame({
        "Model": rows["model"], "Dataset": rows["dataset"], "Accelerator": rows["accelerator"].map(LABELS),
        "Time (ms)": 1000 * rows["execution_time"], "Speed-up": gains["speed-up"], "Energy (mJ)": rows["total_energy"],
        "Energy saving": gains["energy saving"], "DRAM (MB)": rows["total_dram_access"] / 1e6, "Basis": rows["basis"],
    })  # fmt: skip


def defect_text(defect: pd.DataFrame) -> str:
    """The defect of the published DRAM count and its size, in two sentences."""
    published = defect[(defect["basis"] == "recomputed here") & defect["dataset"].isin(["videomme", "mlvu", "mvbench"])]
    low, high = published["more (%)"].min(), published["more (%)"].max()
    ours = defect[(defect["basis"] == "ours") & (defect["accelerator"] == "focus")]["more (%)"]
    mine = (
        f", those of full Focus on this profile's traces by {ours.min():.1f} to {ours.max():.1f} %" if len(ours) else ""
    )
    return (
        "The simulator's attention mask loses a dimension, so that the DRAM bytes of QKᵀ take \"vectors a token minus "
        'pruned tokens" for the tokens present (negative after pruning) and count one head of all. '
        f"Counted right, the bytes of SEC alone on the nine video cells rise by {low:.1f} to {high:.1f} %{mine}; "
        "cycles stay as they are."
    )


def _joined(products: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(
        [table.assign(model=model, dataset=dataset) for (model, dataset), table in products.items()], ignore_index=True
    )


def _with_means(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Cells in rows named model and data set, and after them each basis's geometric mean."""
    ours_too = np.where(table["basis"] == "ours", ", ours", "")  # the paper's models can be run here as well
    table = table.assign(cell=table["model"] + " " + table["dataset"] + ours_too)
    paper, ours = table[table["basis"] != "ours"], table[table["basis"] == "ours"]
    parts = []
    for part, name in ((paper, "geometric mean, paper"), (ours, "geometric mean, ours")):
        means = part.groupby("accelerator", sort=False).agg({column: _geometric, "basis": "first"}).reset_index()
        parts += [part, means.assign(cell=name)] if len(part) else []
    return pd.concat(parts, ignore_index=True)


def _geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))


def _bars(axis: Axes, table: pd.DataFrame, column: str, names: list[str]) -> None:
    """Grouped bars: a group a cell, a colour an accelerator, a hatching a basis."""
    cells = list(dict.fromkeys(table["cell"]))
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        part = table[table["accelerator"] == name]
        at = np.array([cells.index(cell) for cell in part["cell"]]) + (place - (len(names) - 1) / 2) * width
        bars = axis.bar(at, part[column], width, color=_COLORS[name], edgecolor="white", linewidth=0.3)
        for bar, basis in zip(bars, part["basis"], strict=True):
            bar.set_hatch(HATCHES[basis])
        for x, value, cell in zip(at, part[column], part["cell"], strict=True):
            if cell.startswith("geometric") and np.isfinite(value):
                axis.annotate(f"{value:.2f}", (x, value), ha="center", va="bottom", fontsize=6)
    axis.set_xticks(range(len(cells)), cells, fontsize=7, rotation=35, ha="right")


def _legend(figure: Figure, table: pd.DataFrame, names: list[str]) -> None:
    handles = [Patch(color=_COLORS[name], label=LABELS[name]) for name in names if name in set(table["accelerator"])]
    for basis, hatch in HATCHES.items():
        if basis in set(table["basis"]):
            handles.append(Patch(facecolor="lightgrey", edgecolor="white", hatch=hatch, label=basis))
    figure.legend(handles=handles, fontsize=8, ncols=len(handles), loc="outside upper center", frameon=False)
