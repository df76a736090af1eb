"""Tables and the figure of what was measured: time beside counted sparsity."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from focuslib.evaluation.speed import explain


def speed_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Medians of each method's prefill, of the time to the first token and of a token after it; peak memory."""
    return pd.DataFrame([
        {
            "Model": row["model"], "Dataset": row["dataset"], "Visual tokens": row["visual_tokens"],
            "Method": row["method"], "Counted sparsity (%)": 100 * row["sparsity"],
            "Prefill (ms)": row["prefill_ms"], "Quartiles (ms)": _range(row["prefill_ms_quartiles"]),
            "× dense": row["over_dense"], "First token (ms)": row["first_token_ms"],
            "Token (ms)": row["decode_ms"], "Peak memory (MiB)": row["memory_mib"], "What the time is": explain(row),
        }
        for row in rows
    ])  # fmt: skip


def _range(quartiles: list[float]) -> str:
    return " to ".join(f"{value:.1f}" for value in quartiles)


def speed_figure(rows: list[dict[str, Any]]) -> Figure | None:
    """Prefill time over the dense model's against counted sparsity, one panel a model and data set.

    On the line, time would fall as the operations do. Full marks: methods whose savings are all real here; hollow ones
    emulate an accelerator, at least in part.
    """
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["over_dense"] is not None:
            panels.setdefault((row["model"], row["dataset"]), []).append(row)
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, sharex=True, layout="constrained"
    )
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    for axis, ((model, dataset), members) in zip(axes[0], panels.items(), strict=True):
        axis.plot([0, 100], [1, 0], color="gray", linewidth=1, label="as the operations")
        for marker, row in zip("osD^v<>P", members, strict=False):
            colour = colours[row["method"]]
            face = "none" if row["emulates"] else colour
            share = ("", " (emulated)", " (partly emulated)")[
                row["emulates"] + (row["emulates"] and row["drops_tokens"])
            ]
            label = f"{row['method']}{share}"
            axis.plot(100 * row["sparsity"], row["over_dense"], marker, color=colour, markerfacecolor=face, label=label)
        axis.set_title(f"{model}\n{dataset}, {members[0]['visual_tokens']} visual tokens", fontsize=9)
        axis.set_xlabel("counted sparsity (%)")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("prefill time over dense")
    axes[0][-1].legend(fontsize=8)
    return figure


def machine_text(machine: dict[str, Any]) -> str:
    """Where it was measured, in a line."""
    if not machine:
        return "nothing was measured"
    load = "unknown" if machine["load"] is None else f"{machine['load']:.1f}"
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return f"{machine['device']}: {machine['threads']} of {machine['cores']} cores, load {load}; {packages}"


def gpu_table(records: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Prefill and memory of the 7B shape under every method, from the records of `python -m benchmarks.gpu`."""
    return pd.DataFrame([
        {
            "GPU": record["machine"]["device"], "Method": row["method"], "Counted sparsity (%)": 100 * row["sparsity"],
            "Prefill (ms)": row["prefill_ms"], "× dense": row["over_dense"], "Peak memory (MiB)": row["memory_mib"],
            "What the time is": explain(row),
        }
        for record in records.values()
        for row in record["prefill"]
        if "left_out" not in row
    ])  # fmt: skip
