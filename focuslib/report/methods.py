"""Tables and figures of the comparison of methods and controls, and one HTML page of them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from focuslib.evaluation.statistics import (
    SATURATED,
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    proportion_interval,
)
from focuslib.experiments.cell import Cell
from focuslib.experiments.compare import CONTROL
from focuslib.experiments.store import CellResult, Outcome, paired_scores
from focuslib.explore.view import ViewData
from focuslib.report.figures import kept_rows_figure
from focuslib.report.tables import cost_table, write_csv


def target_of(cell: Cell) -> float:
    """The counted sparsity (percent) that a cell was asked to meet; nan where it ran at its own settings."""
    target = cell.settings.get("target_sparsity")
    return float("nan") if target is None else 100 * target


def methods_table(results: list[CellResult], failed: Mapping[Cell, str] | None = None) -> pd.DataFrame:
    """One row a (model, data set, method, target): right answers, counted sparsity, and paired differences in points.

    Differences to dense, and to random tokens at the same target, over the questions both answered, with 95 % half
    width and the exact McNemar p-value, Holm-corrected over the table. Agreement: answers that are the dense model's.
    failed: cell → why it has no result (see Outcome); it is a row with that as its note.
    """
    scored = [result for result in results if result.cell.kind == "accuracy"]
    dense = {_pair(result): result for result in scored if result.cell.method == "dense"}
    random = {(*_pair(result), target_of(result.cell)): result for result in scored if result.cell.method == CONTROL}
    rows = []
    for result in scored:
        scores = [sample["score"] for sample in result.samples]
        low, high = proportion_interval(sum(scores), len(scores))
        target = target_of(result.cell)
        row = {
            "Model": result.cell.model, "Dataset": result.cell.dataset, "Method": result.cell.method,
            "Target": target, "Questions": len(scores), "Failed": len(result.failures),
            "Right": 100 * float(np.mean(scores)), "Low": 100 * low, "High": 100 * high,
            "Computation sparsity": 100 * mean_interval([s["computation_sparsity"] for s in result.answered])[0],
        }  # fmt: skip
        for name, base in (("dense", dense.get(_pair(result))), (CONTROL, random.get((*_pair(result), target)))):
            if base is not None and base is not result:
                pair = paired_scores(base, result)
                difference, half = paired_difference(*pair)
                row |= {f"Minus {name}": 100 * difference, f"± ({name})": 100 * half, f"p ({name})": mcnemar(*pair)[2]}
        if _pair(result) in dense:
            row["Agrees with dense"] = 100 * agreement(dense[_pair(result)], result)
        row["Note"] = "saturated" if row["Right"] >= SATURATED else ""
        rows.append(row)
    for cell, why in (failed or {}).items():
        if cell.kind == "accuracy":
            row = {"Model": cell.model, "Dataset": cell.dataset, "Method": cell.method, "Target": target_of(cell)}
            rows.append(row | {"Questions": 0, "Failed": 0, "Note": why})
    table = pd.DataFrame(rows)
    for name in ("dense", CONTROL):
        if f"p ({name})" in table:
            table[f"p ({name})"] = holm(table[f"p ({name})"])
    return table


def agreement(dense: CellResult, other: CellResult) -> float:
    """The share of questions, 0 … 1, to which two cells gave the same answer, of those that both answered."""
    known = {(s["task"], s["doc_id"]): s["answer"] for s in dense.answered}
    same = [known[key] == s["answer"] for s in other.answered if (key := (s["task"], s["doc_id"])) in known]
    return float(np.mean(same)) if same else float("nan")


def methods_average(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the data sets, one row a (model, method, target); data sets: how many of them it was asked on.

    Note: why it was asked on fewer of them, or none.
    """
    if "Right" not in table:
        return table
    columns = [c for c in ("Right", "Computation sparsity", "Minus dense", f"Minus {CONTROL}", "Agrees with dense")
               if c in table]  # fmt: skip
    keys = ["Model", "Method", "Target"]
    groups = table.groupby(keys, sort=False, dropna=False)
    notes = table.assign(Why=table["Note"].where(table["Questions"] == 0)).groupby(keys, sort=False, dropna=False)
    why = notes["Why"].agg(lambda reasons: "; ".join(dict.fromkeys(reasons.dropna())))
    counts = {"Data sets": groups["Right"].count(), "Questions": groups["Questions"].sum(), "Note": why}
    return groups[columns].mean().assign(**counts).reset_index()


def methods_figure(table: pd.DataFrame) -> Figure | None:
    """Right answers over counted sparsity, a line a method, one panel a (model, data set)."""
    table = table[table["Questions"] > 0] if len(table) else table
    if table.empty:
        return None
    panels = list(table.groupby(["Model", "Dataset"], sort=False))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.8), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    methods = list(dict.fromkeys(table["Method"]))
    colours = dict(zip(methods, sns.color_palette("husl", len(methods)), strict=True))
    for axis, ((model, dataset), rows) in zip(axes[0], panels, strict=True):
        for number, (method, points) in enumerate(rows.groupby("Method", sort=False)):
            points = points.sort_values("Computation sparsity")
            style = {"dense": "*", CONTROL: "X"}.get(str(method), "osD^v<>Ph"[number % 9])
            axis.plot(
                points["Computation sparsity"], points["Right"], marker=style, markersize=5, color=colours[method],
                linewidth=2 if method == CONTROL else 0.9, label=method,
            )  # fmt: skip
        axis.set_title(f"{model}\n{dataset}, {int(rows['Questions'].max())} questions", fontsize=9)
        axis.set_xlabel("counted sparsity (%)")
    axes[0][0].set_ylabel("right answers (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), fontsize=8, frameon=False)
    return figure


def kept_by_method_figure(outcome: Outcome) -> Figure | None:
    """Which tokens each method leaves of one clip at the end, small multiples: one row a method."""
    rows, shown = {}, None
    for result in outcome.results:
        if result.view:
            data = ViewData.load(outcome.folder / "cells" / result.view)
            if data.frames is not None:
                shown = data
                everything = np.arange(len(data.layout.frame))
                rows[result.cell.method] = np.asarray(list(data.kept.values())[-1]) if data.kept else everything
    if shown is None or shown.frames is None:
        return None
    return kept_rows_figure(shown.frames, shown.layout, rows, shown.question.splitlines()[0])


def write_methods(outcome: Outcome) -> None:
    """Write methods.csv of an outcome into its folder."""
    table = methods_table(outcome.results, outcome.failed)
    if not table.empty:
        write_csv(table.round(4), outcome.folder / "methods.csv")


def comparison_summary(outcome: Outcome) -> str:
    """The outcome's summary without failures that the table has a row for: of a method that cannot run here."""
    told = {(cell.model, cell.dataset, cell.method, str(cell.settings)) for cell in outcome.failed
            if cell.kind == "accuracy"}  # fmt: skip
    known = {f"failed: {cell}: {why}" for cell, why in outcome.failed.items()
             if (cell.model, cell.dataset, cell.method, str(cell.settings)) in told}  # fmt: skip
    return "\n".join(line for line in outcome.summary().splitlines() if line not in known)


def write_page(outcome: Outcome, path: Path, title: str) -> Path:
    """One HTML page of the comparison: tables and figures, nothing loaded from elsewhere."""
    table = methods_table(outcome.results, outcome.failed)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(comparison_summary(outcome))}</pre>"]
    for heading, shown in (("Means over the data sets", methods_average(table)), ("Every data set", table),
                           ("Measured prefill", cost_table(outcome.results))):  # fmt: skip
        if not shown.empty:
            shown = shown[sorted(shown, key=lambda name: name == "Note")]  # the widest column last
            parts += [f"<h2>{heading}</h2>", shown.to_html(index=False, float_format="%.2f", na_rep="", border=0)]
    for figure in (methods_figure(table), kept_by_method_figure(outcome)):
        if figure is not None:
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=110)
            plt.close(figure)
            parts.append(f'<img src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">')
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:2px 8px;text-align:right}img{max-width:100%}"
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page + "\n".join(parts), encoding="utf-8")
    partial.replace(path)
    return path


def _pair(result: CellResult) -> tuple[str, str]:
    return result.cell.model, result.cell.dataset
