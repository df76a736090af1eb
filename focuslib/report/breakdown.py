"""Methods side by side on the same questions: by difficulty, by kind of question, and which pairs of them differ."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd

from focuslib.evaluation.statistics import holm, mcnemar, paired_difference
from focuslib.experiments.curves import CurvePoint, counted_sparsity, nearest_points
from focuslib.experiments.store import CellResult, Outcome
from focuslib.report.curves import DENSE, dense_results

ALPHA = 0.01  # two-sided, after Holm's correction over all pairs of a model
Chosen = dict[tuple[str, str], list[CellResult]]  # (model, name of a method) → its result on each data set
Question = tuple[str, str, int]  # data set, task, number


def matched_results(results: list[CellResult]) -> Chosen:
    """The results of a comparison at equal sparsity ("matched" cells), and dense."""
    dense = [(DENSE, result) for result in dense_results(results).values()]
    return _by_name([*dense, *((r.cell.method, r) for r in results if r.cell.kind == "matched")])


def near_results(
    outcome: Outcome, points: list[CurvePoint], near: float, within: float | None = None, dense: bool = True
) -> Chosen:
    """Of each curve, the points nearest a counted sparsity (percent); dense: dense too.

    within: leave out curves that have none within so many points of it on every data set where dense has a result.
    """
    base = dense_results(outcome.results)
    named = [(DENSE, result) for result in base.values()] if dense else []
    found = [(name, result) for (name, *_), (_, result) in nearest_points(points, outcome.results, near).items()]
    chosen = _by_name([*named, *found])
    if within is None:
        return chosen
    datasets = {model: sum(at[0] == model for at in base) for model, _ in base}
    return {
        (model, name): results
        for (model, name), results in chosen.items()
        if name == DENSE
        or (
            len(results) == datasets.get(model)
            and all(abs(counted_sparsity(result) - near) <= within for result in results)
        )
    }


def _by_name(named: Iterable[tuple[str, CellResult]]) -> Chosen:
    chosen: Chosen = {}
    for name, result in named:
        chosen.setdefault((result.cell.model, name), []).append(result)
    return chosen


def breakdown_table(chosen: Chosen, by: str) -> pd.DataFrame:
    """One row a method, one column a value of a fact (difficulty, question_type): right answers in percent.

    The columns say how many questions they stand for: those that all methods of the model were asked. Empty where no
    question has the fact.
    """
    tables = []
    for model in dict.fromkeys(model for model, _ in chosen):
        asked = {name: _samples(results) for (at, name), results in chosen.items() if at == model}
        shared = set.intersection(*(set(samples) for samples in asked.values()))
        facts = {
            key: sample[by] for key, sample in next(iter(asked.values())).items() if key in shared and by in sample
        }
        if not facts:
            continue
        values = {value: [key for key, fact in facts.items() if fact == value] for value in sorted(set(facts.values()))}
        rows = []
        for name, samples in asked.items():
            sparsities = [counted_sparsity(result) for result in chosen[model, name]]
            row = {"Model": model, "Method": name, "Computation sparsity": float(np.mean(sparsities))}
            for value, keys in values.items():
                right = float(np.mean([samples[key]["score"] for key in keys]))
                row[f"{by.replace('_', ' ')} {value} ({len(keys)})"] = 100 * right
            rows.append(row | {f"all ({len(facts)})": 100 * float(np.mean([samples[key]["score"] for key in facts]))})
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def pairs_table(chosen: Chosen) -> pd.DataFrame:
    """Every two methods on the questions both were asked: difference in points with its 95 % half width, and p.

    p: the exact McNemar test, Holm-corrected over all pairs of a model. The better one stands first; the surest
    difference on top.
    """
    tables = []
    for model in dict.fromkeys(model for model, _ in chosen):
        asked = {name: _samples(results) for (at, name), results in chosen.items() if at == model}
        rows = [_pair_row(model, asked, *pair) for pair in combinations(asked, 2)]
        if rows:
            table = pd.DataFrame(rows)
            table["p (Holm)"] = holm(table["p"])
            tables.append(table.sort_values(["p (Holm)", "p"], kind="stable"))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _pair_row(model: str, asked: dict[str, dict[Question, dict]], first: str, second: str) -> dict:
    """One pair, the better one first."""
    keys = [key for key in asked[first] if key in asked[second]]
    scores = {name: [asked[name][key]["score"] for key in keys] for name in (first, second)}
    better, worse = sorted((first, second), key=lambda name: -sum(scores[name]))
    difference, half = paired_difference(scores[worse], scores[better])
    won, lost, p = mcnemar(scores[better], scores[worse])
    return {
        "Model": model, "Better": better, "Worse": worse, "Questions": len(keys), "Difference": 100 * difference,
        "±": 100 * half, "Only the better right": won, "Only the worse right": lost, "p": p,
    }  # fmt: skip


def significant_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The rows of a pairs table that differ significantly."""
    return pairs[pairs["p (Holm)"] < ALPHA] if len(pairs) else pairs


def pairs_sentence(pairs: pd.DataFrame) -> str:
    """How many pairs of methods differ significantly, in words."""
    if pairs.empty:
        return "No two methods can be compared."
    count = len(significant_pairs(pairs))
    methods = len({*pairs["Better"], *pairs["Worse"]})
    return f"{count} of {len(pairs)} pairs of {methods} methods differ at p < {ALPHA:g} (McNemar, Holm-corrected)."


def _samples(results: list[CellResult]) -> dict[Question, dict]:
    return {(r.cell.dataset, s["task"], s["doc_id"]): s for r in results for s in r.samples}
