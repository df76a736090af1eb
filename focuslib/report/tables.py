"""Tables of the experiments, derived from the cells' results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from focuslib.errors import UserError
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.statistics import SATURATED, mcnemar, mean_interval, paired_difference, proportion_interval
from focuslib.experiments.cell import Cell
from focuslib.experiments.store import CellResult, collect, paired_scores
from focuslib.hardware.samples import PUBLISHED_VECTOR, mean_estimate
from focuslib.hardware.shapes import shape_of
from focuslib.methods import METHODS
from focuslib.models import MODELS
from focuslib.paths import params_folder

# method → column of accuracy.csv, the order the published file has
ACCURACY_COLUMNS = {
    "dense": "Dense",
    "framefusion": "FF",
    "adaptiv": "Adaptiv",
    "cmc": "CMC",
    "focus": "Focus",
    "int8_dense": "INT8_Dense",
    "int8_focus": "INT8_Focus",
}
COUNTS = ["Questions", "Failed"]
CMC_SPARSITIES = ("linear_sparsity", "query_sparsity", "attn_score_sparsity")


def comparison_table(results: list[CellResult], kind: str = "accuracy") -> pd.DataFrame:
    """One row a (model, data set, method): accuracy with its interval, difference to dense, sparsity, tokens kept.

    Difference: mean and 95 % half width over the same questions (paired), in points; empty for dense.
    """
    rows = []
    dense = _dense(results)
    for result in results:
        cell = result.cell
        if cell.kind != kind:
            continue
        scores = [sample["score"] for sample in result.samples]
        low, high = proportion_interval(sum(scores), len(scores))
        sparsity, sparsity_half = mean_interval([s["computation_sparsity"] for s in result.answered])
        left = np.mean([s["retained"][-1] / s["visual_tokens"] for s in result.answered])
        row = {
            "Model": cell.model,
            "Dataset": cell.dataset,
            "Method": method_label(cell),
            "Questions": len(scores),
            "Asked": asked(cell),
            "Failed": len(result.failures),
            "Score": result.score,
            "Right": 100 * float(np.mean(scores)),
            "Low": 100 * low,
            "High": 100 * high,
            "Computation sparsity": 100 * sparsity,
            "Sparsity ±": 100 * sparsity_half,
            "Table II sparsity": 100 * float(np.mean([_table_two(s) for s in result.answered])),
            "Tokens at the end": 100 * float(left),
        }
        row["Est. time (ms)"], row["Est. energy (mJ)"] = estimate(result)
        base = dense.get((cell.model, cell.dataset))
        if base is not None and row["Method"] != "dense":
            difference, half = paired_difference(*paired_scores(base, result))
            row |= {"Difference": 100 * difference, "Difference ±": 100 * half}
        row["Note"] = "saturated" if row["Right"] >= SATURATED else ""
        rows.append(row)
    return pd.DataFrame(rows)


def estimate(result: CellResult) -> tuple[float, float]:
    """Time (ms) and energy (mJ) of a mean question's prefill on the method's accelerator (hardware); nan if unknown."""
    cell = result.cell
    try:
        shape = shape_of(cell.model, cell.checkpoint)
        vector = cell.settings.get("vector_size", PUBLISHED_VECTOR)
        seconds, millijoules = mean_estimate(cell.method, result.answered, shape, vector)
    except UserError:  # a decoder that is not on this disk, or a method without counts
        return float("nan"), float("nan")
    return 1000 * seconds, millijoules


def _table_two(sample: dict) -> float:
    """A sample's sparsity by the paper's convention."""
    return sample.get("table_two_sparsity", sample["computation_sparsity"])


def asked(cell: Cell) -> str:
    """Which of a data set's questions a cell asks, in words."""
    if cell.limit is None:
        return "all"
    return "the first, as published" if DATASETS[cell.dataset].stock else "a sample, kinds in proportion"


def accuracy_table(results: list[CellResult]) -> pd.DataFrame:
    """accuracy.csv: one row a (model, data set), one column a method, two decimals, empty where not run.

    A row holds one set of questions, that of the cell with most; a method that was asked fewer is left to a table of
    its own (int8.csv, comparison_matched.csv).
    """
    most: dict[tuple[str, str], set] = {}
    shown = [r for r in results if r.cell.kind == "accuracy" and method_label(r.cell) in ACCURACY_COLUMNS]
    for result in shown:
        key = (result.cell.model, result.cell.dataset)
        most[key] = max(most.get(key, set()), questions_of(result), key=len)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in shown:
        key = (result.cell.model, result.cell.dataset)
        if questions_of(result) == most[key]:
            rows.setdefault(key, {})[ACCURACY_COLUMNS[method_label(result.cell)]] = f"{result.score:.2f}"
    return pd.DataFrame(
        [{"Models": m, "Dataset": d, "Metric": "Acc.", **values} for (m, d), values in rows.items()],
        columns=["Models", "Dataset", "Metric", *ACCURACY_COLUMNS.values()],
    )


def questions_of(result: CellResult) -> set[tuple[str, int]]:
    """The questions that a cell asked."""
    return {(sample["task"], sample["doc_id"]) for sample in result.samples}


def failures_table(results: list[CellResult]) -> pd.DataFrame:
    """failures.csv: the questions that could not be asked or answered; they count as wrong wherever they are scored."""
    rows = [
        {
            "Kind": r.cell.kind, "Model": r.cell.model, "Dataset": r.cell.dataset, "Method": method_label(r.cell),
            "Questions": len(r.samples), "Task": failure["task"], "Question": failure["doc_id"],
            "Why": failure["error"],
        }
        for r in results
        for failure in r.failures
    ]  # fmt: skip
    return pd.DataFrame(rows)


def sparsity_table(results: list[CellResult], method: str, columns: dict[str, str]) -> pd.DataFrame:
    """Means over the first questions of each (model, data set), and how many these are.

    columns: name of the method's statistic → column. adaptiv_sparsity.csv and cmc_sparsity.csv have these alone.
    """
    rows = [
        {"Model": r.cell.model, "Dataset": r.cell.dataset}
        | {column: mean_interval([s["stats"][name] for s in r.answered])[0] for name, column in columns.items()}
        | {"Questions": len(r.samples), "Failed": len(r.failures)}
        for r in results
        if r.cell.kind == "sparsity" and r.cell.method == method
    ]
    return pd.DataFrame(rows, columns=["Model", "Dataset", *columns.values(), *COUNTS])


def meta_data_table(results: list[CellResult]) -> pd.DataFrame:
    """meta_data.csv: the geometry of the sample whose trace was written."""
    rows = []
    for result in results:
        if result.cell.kind != "trace" or method_label(result.cell) != "focus" or result.median_index is None:
            continue
        sample = result.samples[result.median_index]
        rows.append({
            "Model": result.cell.model,
            "Dataset": result.cell.dataset,
            "Sequence length": sample["visual_tokens"],
            "Num frames": sample["num_frames"],
            "Num patches": sample["visual_tokens"] // sample["num_frames"],
            "Median index": result.median_index,
        })  # fmt: skip
    columns = ["Model", "Dataset", "Sequence length", "Num frames", "Num patches", "Median index"]
    return pd.DataFrame(rows, columns=columns)


def write_tables(folder: Path) -> None:
    """Write every CSV that the results in a folder allow; dse.write_dse_tables writes those of the design space."""
    results = _most_questions(collect(folder, skip=("curves", "dse", "methods")))
    tables = {
        "accuracy": accuracy_table(results),
        "meta_data": meta_data_table(results),
        "adaptiv_sparsity": sparsity_table(results, "adaptiv", {"sparsity": "Sparsity"}).drop(columns=COUNTS),
        "cmc_sparsity": sparsity_table(results, "cmc", {name: name for name in CMC_SPARSITIES}).drop(columns=COUNTS),
        "comparison": comparison_table(results).round(2),
        "comparison_matched": comparison_table(results, "matched").round(2),
        "failures": failures_table(collect(folder)),
    }
    for name, table in tables.items():
        if table.empty:
            (folder / f"{name}.csv").unlink(missing_ok=True)  # of an earlier run
        else:
            write_csv(table, folder / f"{name}.csv")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically."""
    partial = path.with_name(path.name + ".partial")
    table.to_csv(partial, index=False)
    partial.replace(path)


def published() -> pd.DataFrame:
    """The paper's figures: one row a (model, data set, method), columns accuracy and sparsity (percent)."""
    path = params_folder() / "published" / "tables.csv"
    if not path.exists():
        raise UserError(f"{path}: the published figures are missing")
    table = pd.read_csv(path).pivot(index=["model", "dataset", "method"], columns="metric", values="value")
    return table.reset_index().rename_axis(None, axis=1)


def beside_published(results: list[CellResult]) -> pd.DataFrame:
    """Our accuracy and sparsity beside the paper's, for the cells the paper has."""
    ours = comparison_table(results)
    if ours.empty:
        return ours
    theirs = published().rename(columns={
        "model": "Model", "dataset": "Dataset", "method": "Method", "accuracy": "Published score",
        "sparsity": "Published sparsity",
    })  # fmt: skip
    columns = ["Model", "Dataset", "Method", *COUNTS, "Score", "Table II sparsity"]
    return ours[columns].merge(theirs, on=["Model", "Dataset", "Method"])


def paired_table(results: list[CellResult], against: str = "focus") -> pd.DataFrame:
    """Every other method against one, question by question: difference with its interval, exact McNemar test."""
    accuracy = [r for r in results if r.cell.kind == "accuracy"]
    base = {(r.cell.model, r.cell.dataset): r for r in accuracy if method_label(r.cell) == against}
    rows = []
    for result in accuracy:
        key = (result.cell.model, result.cell.dataset)
        if method_label(result.cell) == against or key not in base:
            continue
        difference, half = paired_difference(*paired_scores(base[key], result))
        lost, won, p = mcnemar(*paired_scores(base[key], result))
        rows.append({
            "Model": key[0], "Dataset": key[1], "Method": method_label(result.cell),
            "Questions": len(paired_scores(base[key], result)[0]),
            f"Minus {against}": 100 * difference, "±": 100 * half,
            f"Only {against} right": lost, "Only it right": won, "McNemar p": p,
        })  # fmt: skip
    return pd.DataFrame(rows)


def layout_of_table_two(results: list[CellResult]) -> pd.DataFrame:
    """The paper's Table II: methods in columns, score and computation sparsity in rows, published figures beside.

    Questions: how many the row's numbers stand for, all of them if methods differ. Failed: how many of these failed.
    """
    ours = comparison_table(results)
    theirs = published()
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    counts = {}
    for key, group in ours.groupby(["Model", "Dataset"]) if len(ours) else ():
        questions = "/".join(map(str, group["Questions"].unique()))
        counts[key] = {"Questions": questions, "Failed": int(group["Failed"].sum())}
    for _, row in ours.iterrows():
        for kind, column in (("score", "Score"), ("sparsity", "Table II sparsity")):
            rows.setdefault((row["Model"], row["Dataset"], kind), {})[row["Method"]] = row[column]
    for _, row in theirs.iterrows():
        for kind, column in (("score", "accuracy"), ("sparsity", "sparsity")):
            key = (row["model"], row["dataset"], kind)
            if key in rows and row["method"] in rows[key]:
                rows[key][f"{row['method']} (published)"] = row[column]
    return pd.DataFrame([
        {"Model": m, "Dataset": d, **counts[m, d], "": kind, **v} for (m, d, kind), v in rows.items()
    ])  # fmt: skip


def cost_table(results: list[CellResult]) -> pd.DataFrame:
    """Measured prefill time and peak memory of each method on the first question, beside its operation count.

    The methods here emulate the savings of an accelerator; this table says what the emulation itself costs.
    Time: the shortest of a few prefills. Memory: above what the loaded model takes.
    """
    rows = [
        {
            "Model": r.cell.model, "Dataset": r.cell.dataset, "Method": r.cell.method,
            "Operations left (%)": 100 * (1 - r.measured["computation_sparsity"]),
            "Prefill (ms)": 1000 * r.measured["seconds"], "Peak memory (MiB)": r.measured["mebibytes"],
        }
        for r in results
        if r.cell.kind == "cost"
    ]  # fmt: skip
    return pd.DataFrame(rows)


def method_label(cell: Cell) -> str:
    """A method's name in tables: with the precision before it where the model is quantised, as published."""
    return f"{cell.quantization}_{cell.method}" if cell.quantization else cell.method


def _most_questions(results: list[CellResult]) -> list[CellResult]:
    """One result for each row and column of the tables: of the latest settings, the cell that asks most questions.

    results: those of the latest run first. The cells of one setting differ in how many questions they ask.
    Returned in the order of the registries, whatever ran when.
    """
    chosen: dict[tuple, CellResult] = {}
    for result in results:
        cell = result.cell
        key = (cell.kind, cell.model, cell.dataset, method_label(cell))
        latest = chosen.setdefault(key, result)
        same = replace(cell, limit=latest.cell.limit, sample=latest.cell.sample) == latest.cell
        if same and len(result.samples) > len(latest.samples):
            chosen[key] = result

    places = {name: number for number, name in enumerate((*MODELS, *DATASETS, *METHODS))}

    def place(result: CellResult) -> tuple:
        names = result.cell.model, result.cell.dataset, result.cell.method
        return result.cell.quantization or "", *(places.get(name, len(places)) for name in names)

    return sorted(chosen.values(), key=place)


def _dense(results: list[CellResult]) -> dict[tuple[str, str], CellResult]:
    """The dense result of each (model, data set)."""
    chosen = [r for r in results if r.cell.kind == "accuracy" and method_label(r.cell) == "dense"]
    return {(r.cell.model, r.cell.dataset): r for r in chosen}


def average_table(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the data sets, one row a (model, method), of a comparison table; counts are sums."""
    if table.empty:
        return table
    columns = [
        c
        for c in ("Score", "Difference", "Computation sparsity", "Table II sparsity", "Tokens at the end")
        if c in table
    ]
    return (
        table.groupby(["Model", "Method"], sort=False)
        .agg({**dict.fromkeys(COUNTS, "sum"), **dict.fromkeys(columns, "mean")})
        .reset_index()
    )
