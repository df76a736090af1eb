"""Tables and figures of the curves: accuracy over counted sparsity, the area under each."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from focuslib.evaluation.statistics import (
    SATURATED,
    area_weights,
    bootstrap_means,
    mcnemar,
    paired_difference,
    proportion_interval,
)
from focuslib.experiments.curves import CurvePoint, counted_sparsity
from focuslib.experiments.store import CellResult, Outcome, paired_scores
from focuslib.report.tables import write_csv

DENSE = "dense"  # the curve, and the family, of the unchanged model
MEAN = "mean"  # the name of the mean over the data sets


def curves_table(outcome: Outcome, points: list[CurvePoint]) -> pd.DataFrame:
    """One row a point: counted sparsity, right answers, and the paired difference to dense in points.

    Right: with Wilson's 95 % interval. Difference: with its 95 % half width (Bonett and Price) and the exact McNemar p,
    not corrected. A point without a result is a row that says why.
    """
    known, dense = {result.cell: result for result in outcome.results}, dense_results(outcome.results)
    rows = [_row(DENSE, DENSE, "unchanged", result, result) for result in dense.values()]
    for point in points:
        cell = point.cell
        names = {"Model": cell.model, "Dataset": cell.dataset, "Curve": point.curve}
        if cell in known:
            base = dense.get((cell.model, cell.dataset))
            rows.append(_row(point.curve, point.family, point.setting, known[cell], base))
        elif cell in outcome.failed:
            rows.append({**names, "Family": point.family, "Setting": point.setting, "Questions": 0, "Failed": 0,
                         "Note": outcome.failed[cell]})  # fmt: skip
    return pd.DataFrame(rows)


def _row(curve: str, family: str, setting: str, result: CellResult, dense: CellResult | None) -> dict:
    scores = [sample["score"] for sample in result.samples]
    low, high = proportion_interval(sum(scores), len(scores))
    row = {
        "Model": result.cell.model, "Dataset": result.cell.dataset, "Curve": curve, "Family": family,
        "Setting": setting, "Questions": len(scores), "Failed": len(result.failures),
        "Computation sparsity": counted_sparsity(result), "Right": 100 * float(np.mean(scores)),
        "Low": 100 * low, "High": 100 * high, "Minus dense": np.nan, "±": np.nan, "p": np.nan,
    }  # fmt: skip
    if dense is not None and dense is not result:
        pair = paired_scores(dense, result)
        difference, half = paired_difference(*pair)
        row |= {"Minus dense": 100 * difference, "±": 100 * half, "p": mcnemar(*pair)[2]}
    return row | {"Note": "saturated" if row["Right"] >= SATURATED else ""}


def dense_results(results: list[CellResult]) -> dict[tuple[str, str], CellResult]:
    """(model, data set) → its dense result."""
    dense = [result for result in results if result.cell.kind == "accuracy" and result.cell.method == "dense"]
    return {(result.cell.model, result.cell.dataset): result for result in dense}


def areas_table(outcome: Outcome, points: list[CurvePoint], upto: float, seed: int = 0) -> pd.DataFrame:
    """One row a curve and model: its mean accuracy from no sparsity up to `upto` (percent), the area under it.

    Of the mean over the data sets, and of each data set. The curve begins at the dense score and is linear between its
    points (statistics.area_weights); where it does not reach `upto` on a data set, the area there and the mean are
    empty, and the note says so. Of dense: its score.
    Interval: 95 % of a bootstrap that draws the questions of each data set, the same ones for every curve; the points'
    sparsities are taken as they are. It has no width where every question asked was answered alike.
    `Of dense`: the mean over dense's, in percent, from the same draws.
    """
    rows = []
    dense = dense_results(outcome.results)
    for model in dict.fromkeys(model for model, _ in dense):
        curves, areas = _areas(outcome, points, {at: base for at, base in dense.items() if at[0] == model}, upto)
        drawn = 100 * bootstrap_means(list(areas.values()), seed)  # [draws, curves], dense first
        each = {dataset: 100 * found.mean(0) for dataset, found in areas.items()}
        means = np.mean(list(each.values()), axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):  # of few questions, dense may have none right
            shares, drawn_shares = 100 * means / means[0], 100 * drawn / drawn[:, :1]
        for number, curve in enumerate(curves):
            lacking = [dataset for dataset, found in each.items() if np.isnan(found[number])]
            row = {"Model": model, "Curve": curve, "Questions": sum(map(len, areas.values()))}
            row |= _interval("Area", means[number], drawn[:, number])
            row |= _interval("Of dense", shares[number], drawn_shares[:, number])
            row |= {f"Area, {dataset}": found[number] for dataset, found in each.items()}
            row["Note"] = f"{upto:g} % not reached on {', '.join(lacking)}" if lacking else ""
            rows.append(row)
    return pd.DataFrame(rows)


def _interval(name: str, value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {name: float(value), f"{name}, low": float(low), f"{name}, high": float(high)}


def _areas(
    outcome: Outcome, points: list[CurvePoint], dense: dict[tuple[str, str], CellResult], upto: float
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of a model's curves, dense first, and data set → each question's part of the area under each, [N, M]."""
    known = {result.cell: result for result in outcome.results}
    curves = list(dict.fromkeys(point.curve for point in points if point.cell in known))
    areas = {}
    for (model, dataset), base in dense.items():
        columns = [_scores(base, base)]
        for curve in curves:
            results = [
                known[point.cell]
                for point in points
                if point.curve == curve and (point.cell.model, point.cell.dataset) == (model, dataset)
                and point.cell in known
            ]  # fmt: skip
            weights = area_weights([counted_sparsity(result) for result in results], upto)
            scores = np.array([_scores(base, result) for result in (base, *results)])
            columns.append(np.full(scores.shape[1], np.nan) if weights is None else weights @ scores)
        areas[dataset] = np.stack(columns, axis=1)
    return [DENSE, *curves], areas


def _scores(dense: CellResult, result: CellResult) -> np.ndarray:
    """The scores of a cell in the order of dense's questions, [N]."""
    known = {(sample["task"], sample["doc_id"]): sample["score"] for sample in result.samples}
    return np.array([known[sample["task"], sample["doc_id"]] for sample in dense.samples], dtype=float)


def curves_figure(table: pd.DataFrame) -> Figure | None:
    """Right answers over counted sparsity, a line a curve: a row a family, a column a data set and their mean.

    Bands: the paired 95 % interval of the difference to dense. Dashed: dense.
    """
    table = table[table["Questions"] > 0] if len(table) else table
    if table.empty or set(table["Curve"]) == {DENSE}:
        return None
    families = [family for family in dict.fromkeys(table["Family"]) if family != DENSE]
    panels = [*table[["Model", "Dataset"]].drop_duplicates().itertuples(index=False, name=None)]
    panels += [(model, MEAN) for model in dict.fromkeys(table["Model"]) if sum(m == model for m, _ in panels) > 1]
    figure, axes = plt.subplots(
        len(families), len(panels), figsize=(3.4 * len(panels), 2.9 * len(families)), squeeze=False, sharex=True,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for line, family in zip(axes, families, strict=True):
        for axis, (model, dataset) in zip(line, panels, strict=True):
            rows = table[(table["Model"] == model) & table["Family"].isin([family, DENSE])]
            rows = mean_over_datasets(rows) if dataset == MEAN else rows[rows["Dataset"] == dataset]
            _panel(axis, rows)
            axis.set_title(f"{model}, {dataset}, {int(rows['Questions'].max())} questions", fontsize=8)
        line[0].set_ylabel(f"{family}\nright answers (%)")
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("counted sparsity (%)")
    return figure


def mean_over_datasets(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the data sets of the points of each curve that all of them have, setting by setting.

    The half widths of independent differences add up as squares.
    """
    datasets = table["Dataset"].nunique()
    groups = table.assign(Square=table["±"] ** 2).groupby(["Curve", "Setting"], sort=False)
    means = groups[["Computation sparsity", "Right", "Minus dense"]].mean()
    means["±"] = np.sqrt(groups["Square"].sum()) / datasets
    return means.assign(Questions=groups["Questions"].sum())[groups.size() == datasets].reset_index()


def _panel(axis: Axes, rows: pd.DataFrame) -> None:
    """The lines of one family."""
    dense = rows[rows["Curve"] == DENSE]["Right"]
    if len(dense):
        axis.axhline(float(dense.iloc[0]), color="black", linestyle="--", linewidth=0.8, label="dense")
    lines = rows[rows["Curve"] != DENSE]
    colours = sns.color_palette("colorblind", lines["Curve"].nunique())
    for number, (curve, found) in enumerate(lines.groupby("Curve", sort=False)):
        found = found.sort_values("Computation sparsity")
        at, right = found["Computation sparsity"], found["Right"]
        marker = "osD^v<>"[number % 7]
        axis.plot(at, right, color=colours[number], label=curve, marker=marker, markersize=4, linewidth=1.2)
        axis.fill_between(at, right - found["±"], right + found["±"], color=colours[number], alpha=0.1, linewidth=0)
    axis.set_ylim(0, 103)


def write_curves(outcome: Outcome, points: list[CurvePoint], upto: float, seed: int = 0) -> None:
    """Write curves.csv and curve_areas.csv into the outcome's folder."""
    for name, table in (
        ("curves", curves_table(outcome, points)), ("curve_areas", areas_table(outcome, points, upto, seed))
    ):  # fmt: skip
        if not table.empty:
            write_csv(table.round(4), outcome.folder / f"{name}.csv")
