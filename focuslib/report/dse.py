"""Tables and figures of the design-space exploration and of the ablation (paper, Figure 10)."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from focuslib.evaluation.statistics import mcnemar, mean_interval, paired_difference
from focuslib.experiments.paper import SweepPoint
from focuslib.experiments.store import CellResult, Outcome, paired_scores
from focuslib.paths import params_folder
from focuslib.report.tables import write_csv

# sweep → its table and its column there
FILES = {"m_tile_size": "dse_a_m_tile", "vector_size": "dse_b_vector", "block_size": "dse_c_block"}
ALPHA = 0.05  # of the test of a sweep's ends, two-sided
PUBLISHED_MODEL = "llava_vid"  # whose design space the paper explores
TITLES = {
    "m_tile_size": "GEMM m-tile (tokens)",
    "vector_size": "vector (channels)",
    "block_size": "block (frames × side × side)",
}


def sweep_table(outcome: Outcome, points: list[SweepPoint], sweep: str) -> pd.DataFrame:
    """One row a point of a sweep, with the paper's accuracy at the same value where it has one.

    Computed vectors: how many a question needs, over all layers and sites (mean). Tiles and vectors are only compared
    with the paper's on its own model, as their sizes go with a model's; blocks on any.
    """
    published = _published_scores(sweep)
    rows = []
    for point in points:
        result = outcome.result(point.accuracy)
        if point.sweep != sweep or result is None:
            continue
        samples = result.answered
        scores = [s["score"] for s in result.samples]
        comparable = sweep == "block_size" or point.accuracy.model == PUBLISHED_MODEL
        low, high = result.score_interval()
        rows.append({
            "Model": point.accuracy.model, "Dataset": point.accuracy.dataset, "Value": point.value,
            "Questions": len(scores), "Score": result.score, "Low": low, "High": high, "Failed": len(result.failures),
            "Computation sparsity": 100 * mean_interval([s["computation_sparsity"] for s in samples])[0],
            "Computed vectors": mean_interval([s["computed_vectors"] for s in samples])[0],
            "Published score": published.get(point.value) if comparable else None,
        })  # fmt: skip
    return pd.DataFrame(rows).astype({"Published score": float}) if rows else pd.DataFrame()


def write_dse_tables(outcome: Outcome, points: list[SweepPoint]) -> None:
    """Write dse_*_accuracy.csv, one row a setting, and ablation.csv."""
    for sweep, name in FILES.items():
        rows = []
        for point in points:
            result = outcome.result(point.accuracy)
            if point.sweep == sweep and result is not None:
                used = point.accuracy.settings
                rows.append({
                    "m_tile_size": used["m_tile"],
                    "block_size": f"{used['frame_block']}x{used['block']}x{used['block']}",
                    "vector_size": used["vector_size"],
                    "accuracy": f"{result.score:.2f}",
                })  # fmt: skip
        if rows:
            write_csv(pd.DataFrame(rows), outcome.folder / f"{name}_accuracy.csv")
    ablation = ablation_table(outcome.results)
    if not ablation.empty:
        write_csv(ablation.round(2), outcome.folder / "ablation.csv")


def sweep_figure(table: pd.DataFrame, sweep: str) -> Figure | None:
    """A sweep in three panels: score (95 % interval) beside the paper's, computation sparsity, computed vectors."""
    if table.empty:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    at = np.arange(len(table))
    spread = [table["Score"] - table["Low"], table["High"] - table["Score"]]
    axes[0].errorbar(at, table["Score"], yerr=np.abs(spread), marker="o", capsize=3, label="here")
    if table["Published score"].notna().any():
        axes[0].plot(at, table["Published score"], marker="s", linestyle="--", label="published, LLaVA-Video")
        axes[0].legend(fontsize=8)
    axes[1].plot(at, table["Computation sparsity"], marker="o")
    axes[2].bar(at, table["Computed vectors"] / 1000)
    for axis, label in zip(
        axes, ("score, 95 % interval", "computation sparsity (%)", "computed vectors (thousands)"), strict=True
    ):
        axis.set_xticks(at, table["Value"], fontsize=8, rotation=30 if sweep == "block_size" else 0)
        axis.set_xlabel(TITLES[sweep])
        axis.set_ylabel(label)
    return figure


def sweep_sentence(outcome: Outcome, points: list[SweepPoint], sweep: str) -> str:
    """Whether the ends of a sweep differ, by the paired test, and whether as the published ones do."""
    found = [
        (point, result)
        for point in points
        if point.sweep == sweep and (result := outcome.result(point.accuracy)) is not None
    ]
    lines = []
    for model in dict.fromkeys(point.accuracy.model for point, _ in found):
        ends = [(point, result) for point, result in found if point.accuracy.model == model]
        (first, base), (last, other) = ends[0], ends[-1]
        if first is last:
            continue
        pair = paired_scores(base, other)
        difference, half = (100 * value for value in paired_difference(*pair))
        p = mcnemar(*pair)[2]
        verdict = "differ" if p < ALPHA else "do not differ significantly"
        lines.append(
            f"{model}, {TITLES[sweep]}: {first.value} and {last.value} {verdict} on {len(pair[0])} questions "
            f"({difference:+.1f} ± {half:.1f} points, McNemar p = {p:.2g}); {_beside_published(sweep, difference, p)}."
        )
    return "\n".join(lines) or "No sweep with two points has a result."


def _beside_published(sweep: str, difference: float, p: float) -> str:
    """Whether a difference of a sweep's ends goes the way of the published ends."""
    scores = _published_scores(sweep)
    published = scores.iloc[-1] - scores.iloc[0]
    verdict = "does not appear"
    if p < ALPHA and published:
        verdict = "appears" if difference * published > 0 else "is reversed"
    return f"the published trend ({published:+.1f} from {scores.index[0]} to {scores.index[-1]}) {verdict}"


def _published_scores(sweep: str) -> pd.Series:
    """The paper's accuracy of each value of a sweep, in the order of its figure."""
    published = pd.read_csv(params_folder() / "published" / "dse_accuracy.csv", dtype={"value": str})
    return published[published["parameter"] == sweep].set_index("value")["accuracy"]


def shared_with_main(outcome: Outcome, points: list[SweepPoint], main: list[CellResult]) -> pd.DataFrame:
    """The points at the default setting beside the main run's cell: the same questions, answers and sparsities.

    main: results of the main experiment. Empty if it has not been run with the same data sets.
    """
    rows = []
    for point in points:
        ours = outcome.result(point.accuracy)
        for other in main:
            same = ("kind", "model", "dataset", "method", "settings", "checkpoint", "quantization", "seed", "dtype")
            if ours is None or any(getattr(other.cell, name) != getattr(point.accuracy, name) for name in same):
                continue
            theirs = {(s["task"], s["doc_id"]): s for s in other.samples}
            pairs = [(s, theirs[s["task"], s["doc_id"]]) for s in ours.samples if (s["task"], s["doc_id"]) in theirs]
            equal = lambda key, pairs=pairs: sum(a.get(key) == b.get(key) for a, b in pairs)  # noqa: E731
            rows.append({
                "Sweep": point.sweep, "Value": point.value, "Dataset": point.accuracy.dataset, "Questions": len(pairs),
                "Same answer": equal("answer"), "Same sparsity": equal("computation_sparsity"),
            })  # fmt: skip
    return pd.DataFrame(rows)


def ablation_table(results: list[CellResult]) -> pd.DataFrame:
    """Dense, Focus, and Focus without SIC (SEC only) on the same questions: accuracy and multiplications a question.

    Operations: over visual tokens in all layers, in millions (mean), and what is left of the dense model's.
    """
    rows = []
    for ablated in (r for r in results if r.cell.kind == "ablation"):
        cell = ablated.cell
        dense, focus = (
            next(
                (r for r in results if r.cell == replace(cell, kind="accuracy", method=method, settings=settings)), None
            )
            for method, settings in (("dense", {}), ("focus", {**cell.settings, "sec_only": False}))
        )
        for name, result in (("dense", dense), ("focus, SEC only", ablated), ("focus", focus)):
            if result is None:
                continue
            samples = result.answered
            left = np.array([(1 - s["computation_sparsity"]) * s["dense_operations"] for s in samples])
            difference, half = np.nan, np.nan
            if dense is not None and name != "dense":
                difference, half = paired_difference(*paired_scores(dense, result))
            rows.append({
                "Model": cell.model, "Dataset": cell.dataset, "Method": name,
                "Questions": len(result.samples), "Failed": len(result.failures),
                "Score": result.score, "Difference": 100 * difference, "Difference ±": 100 * half,
                "Operations (million)": left.mean() / 1e6,
                "Operations left (%)": 100 * left.sum() / sum(s["dense_operations"] for s in samples),
            })  # fmt: skip
    return pd.DataFrame(rows)
