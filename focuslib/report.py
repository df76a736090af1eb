"""Tables and figures of the experiments, derived from the cells' results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from focuslib.errors import UserError
from focuslib.experiments import CellResult, collect
from focuslib.methods.settings import make_method
from focuslib.ops import SITES

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
Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def proportion_interval(right: float, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, 0 … 1."""
    p, z2 = right / asked, Z95**2
    centre = (p + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z95 / (1 + z2 / asked) * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval (normal approximation); the half width is 0 for one value."""
    values = np.asarray(list(values), dtype=float)
    half = Z95 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(half)


def comparison_table(results: list[CellResult]) -> pd.DataFrame:
    """One row a (model, data set, method): accuracy with its interval, difference to dense, sparsity, tokens, cost.

    Difference: mean and 95 % half width over the same questions (paired), in points; empty for dense.
    """
    rows = []
    dense = {(r.cell.model, r.cell.dataset): r for r in results if r.cell.kind == "accuracy" and r.cell.method == "dense"}
    for result in results:
        cell = result.cell
        if cell.kind != "accuracy":
            continue
        scores = [sample["score"] for sample in result.samples]
        low, high = proportion_interval(sum(scores), len(scores))
        sparsity, sparsity_half = mean_interval(s["computation_sparsity"] for s in _read(result))
        row = {
            "Model": cell.model,
            "Dataset": cell.dataset,
            "Method": cell.method,
            "Questions": len(scores),
            "Score": result.score,
            "Low": 100 * low,
            "High": 100 * high,
            "Computation sparsity": 100 * sparsity,
            "Sparsity ±": 100 * sparsity_half,
            "Tokens at the end": 100 * float(np.mean([s["retained"][-1] / s["visual_tokens"] for s in _read(result)])),
        }
        base = dense.get((cell.model, cell.dataset))
        if base is not None and cell.method != "dense":
            difference, half = paired_difference(base, result)
            row |= {"Difference": 100 * difference, "Difference ±": 100 * half}
        rows.append(row)
    return pd.DataFrame(rows)


def paired_difference(base: CellResult, other: CellResult) -> tuple[float, float]:
    """Mean score difference on the questions both answered, and its 95 % half width."""
    scores = {(s["task"], s["doc_id"]): s["score"] for s in base.samples}
    pairs = [s["score"] - scores[s["task"], s["doc_id"]] for s in other.samples if (s["task"], s["doc_id"]) in scores]
    return mean_interval(pairs)


def accuracy_table(results: list[CellResult]) -> pd.DataFrame:
    """accuracy.csv: one row a (model, data set), one column a method, two decimals, empty where not run."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        column = ACCURACY_COLUMNS.get(result.cell.method)
        if result.cell.kind == "accuracy" and column:
            rows.setdefault((result.cell.model, result.cell.dataset), {})[column] = f"{result.score:.2f}"
    return pd.DataFrame(
        [{"Models": m, "Dataset": d, "Metric": "Acc.", **values} for (m, d), values in rows.items()],
        columns=["Models", "Dataset", "Metric", *ACCURACY_COLUMNS.values()],
    )


def meta_data_table(results: list[CellResult]) -> pd.DataFrame:
    """meta_data.csv: the geometry of the sample whose trace was written."""
    rows = []
    for result in results:
        if result.cell.kind != "trace" or result.cell.method != "focus":
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
    """Write every CSV that the results in a folder allow."""
    results = collect(folder)
    for name, table in (("accuracy", accuracy_table(results)), ("meta_data", meta_data_table(results))):
        write_csv(table, folder / f"{name}.csv")
    write_csv(comparison_table(results).round(2), folder / "comparison.csv")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically."""
    partial = path.with_name(path.name + ".partial")
    table.to_csv(partial, index=False)
    partial.replace(path)


def published(root: Path) -> pd.DataFrame:
    """The paper's figures: one row a (model, data set, method), columns accuracy and sparsity (percent)."""
    path = root / "params" / "published" / "tables.csv"
    if not path.exists():
        raise UserError(f"{path}: the published figures are missing")
    table = pd.read_csv(path).pivot(index=["model", "dataset", "method"], columns="metric", values="value")
    return table.reset_index().rename_axis(None, axis=1)


def beside_published(results: list[CellResult], root: Path) -> pd.DataFrame:
    """Our accuracy and sparsity beside the paper's, for the cells the paper has."""
    ours = comparison_table(results)
    if ours.empty:
        return ours
    theirs = published(root).rename(columns={
        "model": "Model", "dataset": "Dataset", "method": "Method", "accuracy": "Published score",
        "sparsity": "Published sparsity",
    })  # fmt: skip
    columns = ["Model", "Dataset", "Method", "Score", "Computation sparsity"]
    return ours[columns].merge(theirs, on=["Model", "Dataset", "Method"])


def site_sparsity_figure(results: list[CellResult]) -> Figure:
    """Sparsity of each GEMM site by layer, mean over the questions, one panel a data set."""
    rows = [
        {"Dataset": r.cell.dataset, "Site": site, "Layer": layer, "Sparsity (%)": 100 * value}
        for r in _focus(results)
        for site in SITES
        for layer, value in enumerate(np.mean([s["site_sparsity"][site] for s in _read(r)], axis=0))
    ]
    return _lines(rows, y="Sparsity (%)", hue="Site")


def retained_figure(results: list[CellResult]) -> Figure:
    """Visual tokens that reach each layer's MLP, in percent of the original, one panel a data set."""
    rows = [
        {"Dataset": r.cell.dataset, "Method": r.cell.method, "Layer": layer, "Tokens kept (%)": 100 * value}
        for r in results
        if r.cell.kind == "accuracy"
        for layer, value in enumerate(
            np.mean([np.array(s["retained"]) / s["visual_tokens"] for s in _read(r)], axis=0)
        )
    ]
    return _lines(rows, y="Tokens kept (%)", hue="Method")


def kept_tokens_figure(frames: np.ndarray, grid, kept: dict[int, np.ndarray], title: str) -> Figure:
    """A clip with its pruned tokens darkened: one row a pruning layer, one column a frame (at most eight).

    frames: [F, H, W, 3] uint8. kept: layer → positions (0 … S − 1) that are left after it.
    """
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames)), dtype=int)
    rows = {"input": np.arange(grid.length), **{f"after layer {layer}": np.asarray(k) for layer, k in kept.items()}}
    figure, axes = plt.subplots(
        len(rows), len(shown), figsize=(1.4 * len(shown), 1.5 * len(rows)), squeeze=False, layout="constrained"
    )
    height, width = frames.shape[1:3]
    for line, (label, positions) in zip(axes, rows.items(), strict=True):
        mask = np.zeros(grid.num_frames * grid.frame_stride, bool)
        mask[positions] = True
        mask = mask.reshape(grid.num_frames, grid.frame_stride)
        for axis, frame in zip(line, shown, strict=True):
            tokens = mask[frame][: grid.height * grid.height_stride].reshape(grid.height, grid.height_stride)
            tokens = tokens[:, : grid.width]
            rise, run = np.linspace(0, grid.height, height, endpoint=False), np.linspace(0, grid.width, width, endpoint=False)
            light = np.where(tokens[np.ix_(rise.astype(int), run.astype(int))], 1.0, 0.15)[..., None]
            axis.imshow((frames[frame] * light).astype(np.uint8))
            axis.set_xticks([])
            axis.set_yticks([])
            if line is axes[0]:
                axis.set_title(f"frame {frame}", fontsize=8)
        line[0].set_ylabel(f"{label}\n{len(positions)} tokens", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _focus(results: list[CellResult]) -> list[CellResult]:
    return [r for r in results if r.cell.kind == "accuracy" and r.cell.method == "focus"]


def _read(result: CellResult) -> list[dict]:
    """The samples whose media could be read."""
    return [sample for sample in result.samples if "error" not in sample]


def _lines(rows: list[dict], y: str, hue: str) -> Figure:
    grid = sns.relplot(
        pd.DataFrame(rows), x="Layer", y=y, hue=hue, style=hue, col="Dataset", kind="line", markers=True,
        height=2.8, aspect=1.2, palette="colorblind",
    )  # fmt: skip
    grid.set_titles("{col_name}")
    return grid.figure


def average_table(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the data sets, one row a (model, method), of a comparison table."""
    columns = [c for c in ("Score", "Difference", "Computation sparsity", "Tokens at the end") if c in table]
    return table.groupby(["Model", "Method"], sort=False)[columns].mean().reset_index()


def show(table: pd.DataFrame) -> None:
    """Show a table in a notebook: two decimals, no index, empty cells empty."""
    from IPython.display import display

    if table.empty:
        print("no such results")
        return
    display(table.style.format(precision=2, na_rep="").hide(axis="index"))


def example_clip(results: list[CellResult]) -> Figure | None:
    """The first question of the last data set under Focus, run once more: its frames and the tokens kept."""
    chosen = _focus(results)
    if not chosen:
        return None
    from focuslib.evaluate import load_vlm, question

    cell = chosen[-1].cell
    vlm = load_vlm(cell.model, cell.checkpoint, device=cell.device, dtype=cell.dtype)
    media, prompt = question(cell.dataset, vlm.name, 0)
    with make_method(cell.method, cell.settings)(vlm) as run:
        answer = vlm.generate(media, prompt)
    kept = {layer: positions.numpy() for layer, positions in run.last.kept.items()}
    title = f"{prompt.splitlines()[0]} → {answer} ({100 * run.sparsity:.0f} % of the computation saved)"
    return kept_tokens_figure(vlm.frames(media), run.last.grid, kept, title)
