"""Tables of the INT8 experiment (paper, Table IV)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from focuslib.evaluation.statistics import mean_interval, paired_difference
from focuslib.experiments.store import CellResult, Outcome, paired_scores
from focuslib.report.tables import published, write_csv


def degradation_table(results: list[CellResult]) -> pd.DataFrame:
    """Score and computation sparsity in 8 bit beside the unquantised model, on the same questions.

    Change: in 8 bit minus unquantised, mean with the paired 95 % half width, in points. Published: the paper's change.
    """
    accuracy = {
        (r.cell.model, r.cell.dataset, r.cell.method, r.cell.quantization): r
        for r in results
        if r.cell.kind == "accuracy"
    }
    theirs = published().set_index(["model", "dataset", "method"])
    rows = []
    for (model, dataset, method, quantization), result in accuracy.items():
        base = accuracy.get((model, dataset, method, None))
        if not quantization or base is None:
            continue
        change, half = paired_difference(*paired_scores(base, result))
        sparsity, sparsity_half = _sparsity_change(base, result)
        row = {
            "Model": model, "Dataset": dataset, "Method": method, "Type": base.cell.dtype,
            "Questions": len(result.samples), "Failed": len(result.failures) + len(base.failures),
            "Score": base.score, "Score INT8": result.score,
            "Change": 100 * change, "Change ±": 100 * half,
        }  # fmt: skip
        if method != "dense":
            row |= {"Sparsity change": 100 * sparsity, "Sparsity change ±": 100 * sparsity_half}
        for column, metric in (("Published change", "accuracy"), ("Published sparsity change", "sparsity")):
            figures = [theirs[metric].get((model, dataset, name), np.nan) for name in (f"int8_{method}", method)]
            row[column] = figures[0] - figures[1]
        rows.append(row)
    columns = ["Sparsity change", "Sparsity change ±", "Published change", "Published sparsity change"]
    table = pd.DataFrame(rows)
    return table[[*(name for name in table if name not in columns), *(name for name in columns if name in table)]]


def write_int8_table(outcome: Outcome) -> None:
    """Write int8.csv: the scores in 8 bit and unquantised on the same questions, which may be fewer than all."""
    table = degradation_table(outcome.results)
    if not table.empty:
        write_csv(table.round(2), outcome.folder / "int8.csv")


def _sparsity_change(base: CellResult, other: CellResult) -> tuple[float, float]:
    known = {(s["task"], s["doc_id"]): s.get("computation_sparsity") for s in base.samples}
    pairs = [(known.get((s["task"], s["doc_id"])), s.get("computation_sparsity")) for s in other.samples]
    return mean_interval([b - a for a, b in pairs if a is not None and b is not None])


def precision_table(results: list[CellResult]) -> pd.DataFrame:
    """What the linear layers of each part of a model are made of, unquantised and in 8 bit, as loaded for the run."""
    rows = {}
    for result in results:
        key = (result.cell.model, result.cell.quantization or result.cell.dtype)
        for part, layers in result.provenance.get("linear_layers", {}).items():
            rows[(*key, part)] = {"Model": key[0], "Precision": key[1], "Part": part, **layers}
    return pd.DataFrame(rows.values())
