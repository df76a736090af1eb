"""Tables and figures of the experiments, derived from the cells' results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from focuslib.cells import Cell, CellResult, collect, load_cell
from focuslib.errors import UserError
from focuslib.intervals import mcnemar, mean_interval, paired_difference, proportion_interval
from focuslib.layout import TokenLayout
from focuslib.measure import measure
from focuslib.methods import METHODS, Method
from focuslib.methods.settings import make_method
from focuslib.models import MODELS, VLM
from focuslib.ops import SITES
from focuslib.tasks.datasets import DATASETS

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
        sparsity, sparsity_half = mean_interval(s["computation_sparsity"] for s in result.answered)
        left = np.mean([s["retained"][-1] / s["visual_tokens"] for s in result.answered])
        row = {
            "Model": cell.model,
            "Dataset": cell.dataset,
            "Method": method_label(cell),
            "Questions": len(scores),
            "Score": result.score,
            "Right": 100 * float(np.mean(scores)),
            "Low": 100 * low,
            "High": 100 * high,
            "Computation sparsity": 100 * sparsity,
            "Sparsity ±": 100 * sparsity_half,
            "Tokens at the end": 100 * float(left),
        }
        base = dense.get((cell.model, cell.dataset))
        if base is not None and row["Method"] != "dense":
            difference, half = paired_difference(base, result)
            row |= {"Difference": 100 * difference, "Difference ±": 100 * half}
        rows.append(row)
    return pd.DataFrame(rows)


def accuracy_table(results: list[CellResult]) -> pd.DataFrame:
    """accuracy.csv: one row a (model, data set), one column a method, two decimals, empty where not run."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        column = ACCURACY_COLUMNS.get(method_label(result.cell))
        if result.cell.kind == "accuracy" and column:
            rows.setdefault((result.cell.model, result.cell.dataset), {})[column] = f"{result.score:.2f}"
    return pd.DataFrame(
        [{"Models": m, "Dataset": d, "Metric": "Acc.", **values} for (m, d), values in rows.items()],
        columns=["Models", "Dataset", "Metric", *ACCURACY_COLUMNS.values()],
    )


def sparsity_table(results: list[CellResult], method: str, columns: dict[str, str]) -> pd.DataFrame:
    """adaptiv_sparsity.csv and cmc_sparsity.csv: means over the first questions of each (model, data set).

    columns: name of the method's statistic → column.
    """
    rows = [
        {"Model": r.cell.model, "Dataset": r.cell.dataset}
        | {column: mean_interval(s["stats"][name] for s in r.answered)[0] for name, column in columns.items()}
        for r in results
        if r.cell.kind == "sparsity" and r.cell.method == method
    ]
    return pd.DataFrame(rows, columns=["Model", "Dataset", *columns.values()])


def meta_data_table(results: list[CellResult]) -> pd.DataFrame:
    """meta_data.csv: the geometry of the sample whose trace was written."""
    rows = []
    for result in results:
        if result.cell.kind != "trace" or method_label(result.cell) != "focus":
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
    """Write every CSV that the results in a folder allow; report_dse.write_tables writes those of the design space."""
    results = _most_questions(collect(folder, skip=("dse",)))
    tables = {
        "accuracy": accuracy_table(results),
        "meta_data": meta_data_table(results),
        "adaptiv_sparsity": sparsity_table(results, "adaptiv", {"sparsity": "Sparsity"}),
        "cmc_sparsity": sparsity_table(results, "cmc", {name: name for name in CMC_SPARSITIES}),
        "comparison": comparison_table(results).round(2),
        "comparison_matched": comparison_table(results, "matched").round(2),
    }
    for name, table in tables.items():
        if not table.empty:
            write_csv(table, folder / f"{name}.csv")


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


def site_sparsity_figure(results: list[CellResult]) -> Figure | None:
    """Sparsity of each GEMM site by layer, mean over the questions, one panel a data set."""
    rows = [
        {"Dataset": r.cell.dataset, "Site": site, "Layer": layer, "Sparsity (%)": 100 * value}
        for r in _focus(results)
        for site in SITES
        for layer, value in enumerate(np.mean([s["site_sparsity"][site] for s in r.answered], axis=0))
    ]
    return _lines(rows, y="Sparsity (%)", hue="Site")


def retained_figure(results: list[CellResult]) -> Figure | None:
    """Visual tokens that reach each layer's MLP, in percent of the original, one panel a data set."""
    rows = []
    for result in (r for r in results if r.cell.kind == "accuracy"):
        shares = np.mean([np.array(s["retained"]) / s["visual_tokens"] for s in result.answered], axis=0)
        names = {"Dataset": result.cell.dataset, "Method": method_label(result.cell)}
        rows += [{**names, "Layer": layer, "Tokens kept (%)": 100 * value} for layer, value in enumerate(shares)]
    return _lines(rows, y="Tokens kept (%)", hue="Method")


def kept_tokens_figure(frames: np.ndarray, layout: TokenLayout, kept: dict[int, np.ndarray], title: str) -> Figure:
    """A clip with its pruned tokens darkened: one row a pruning layer, one column a frame (at most eight).

    frames: [F, H, W, 3] uint8. layout: where the S visual tokens lie in them; where they overlap (an image and its
    tiles), brightness is the share that is kept. kept: layer → positions (0 … S − 1) that are left after it.
    """
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames)), dtype=int)
    everything = np.arange(len(layout.frame))
    rows = {"input": everything, **{f"after layer {layer}": np.asarray(left) for layer, left in kept.items()}}
    figure, axes = plt.subplots(
        len(rows), len(shown), figsize=(1.4 * len(shown), 1.5 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (label, positions) in zip(axes, rows.items(), strict=True):
        present = np.isin(everything, positions)
        for axis, frame in zip(line, shown, strict=True):
            light = 0.15 + 0.85 * _share_kept(layout, frame, present, frames.shape[1:3])[..., None]
            axis.imshow((frames[frame] * light).astype(np.uint8))
            axis.set_xticks([])
            axis.set_yticks([])
            if line is axes[0]:
                axis.set_title(f"frame {frame}", fontsize=8)
        line[0].set_ylabel(f"{label}\n{len(positions)} tokens", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _share_kept(layout: TokenLayout, frame: int, present: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """For each pixel of a frame, the share of the tokens drawn there that are present; 1 where there are none."""
    height, width = size
    drawn, kept = np.zeros(size), np.zeros(size)
    for token in np.flatnonzero(layout.frame == frame):
        left, top, wide, high = layout.box[token]
        if left >= 1:  # a newline or marker, which stands for no part of the picture
            continue
        edges = [round(top * height), round((top + high) * height), round(left * width), round((left + wide) * width)]
        place = np.s_[edges[0] : edges[1], edges[2] : edges[3]]
        drawn[place] += 1
        kept[place] += present[token]
    return np.divide(kept, drawn, out=np.ones(size), where=drawn > 0)


def paired_table(results: list[CellResult], against: str = "focus") -> pd.DataFrame:
    """Every other method against one, question by question: difference with its interval, exact McNemar test."""
    accuracy = [r for r in results if r.cell.kind == "accuracy"]
    base = {(r.cell.model, r.cell.dataset): r for r in accuracy if method_label(r.cell) == against}
    rows = []
    for result in accuracy:
        key = (result.cell.model, result.cell.dataset)
        if method_label(result.cell) == against or key not in base:
            continue
        difference, half = paired_difference(base[key], result)
        lost, won, p = mcnemar(base[key], result)
        rows.append({
            "Model": key[0], "Dataset": key[1], "Method": method_label(result.cell),
            f"Minus {against}": 100 * difference, "±": 100 * half,
            f"Only {against} right": lost, "Only it right": won, "McNemar p": p,
        })  # fmt: skip
    return pd.DataFrame(rows)


def layout_of_table_two(results: list[CellResult], root: Path) -> pd.DataFrame:
    """The paper's Table II: methods in columns, score and computation sparsity in rows, published figures beside."""
    ours = comparison_table(results)
    theirs = published(root)
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for _, row in ours.iterrows():
        for kind, column in (("score", "Score"), ("sparsity", "Computation sparsity")):
            rows.setdefault((row["Model"], row["Dataset"], kind), {})[row["Method"]] = row[column]
    for _, row in theirs.iterrows():
        for kind, column in (("score", "accuracy"), ("sparsity", "sparsity")):
            key = (row["model"], row["dataset"], kind)
            if key in rows and row["method"] in rows[key]:
                rows[key][f"{row['method']} (published)"] = row[column]
    return pd.DataFrame([{"Model": m, "Dataset": d, "": kind, **v} for (m, d, kind), v in rows.items()])


def trade_off_figure(results: list[CellResult]) -> Figure | None:
    """Score against computation sparsity with 95 % intervals, one panel a data set."""
    table = comparison_table(results)
    if table.empty:
        return None
    panels = list(table.groupby(["Model", "Dataset"], sort=False))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False, sharex=True, layout="constrained"
    )
    methods = list(dict.fromkeys(table["Method"]))
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    for axis, ((model, dataset), rows) in zip(axes[0], panels, strict=True):
        for marker, (_, row) in zip("osD^v<>P", rows.iterrows(), strict=False):
            spread = [[row["Right"] - row["Low"]], [row["High"] - row["Right"]]]
            axis.errorbar(
                row["Computation sparsity"], row["Right"], xerr=row["Sparsity ±"], yerr=spread, fmt=marker,
                color=colours[row["Method"]], label=row["Method"], capsize=3,
            )  # fmt: skip
        axis.set_title(f"{model}\n{dataset}", fontsize=9)
        axis.set_xlabel("computation sparsity (%)")
    axes[0][0].set_ylabel("right answers (%), 95 % interval")
    axes[0][-1].legend(fontsize=8)
    return figure


def cost_table(results: list[CellResult], repeats: int = 5) -> pd.DataFrame:
    """Measured prefill time and peak memory of each method on the first question, beside its operation count.

    The methods here emulate the savings of an accelerator; this table says what the emulation itself costs.
    Time: the shortest of `repeats` prefills. Memory: above what the loaded model takes.
    """
    rows, vlm, loaded = [], None, None
    for result in results:
        cell = result.cell
        if cell.kind != "accuracy":
            continue
        if loaded != (cell.model, cell.checkpoint):
            vlm = load_cell(cell)
            loaded = (cell.model, cell.checkpoint)
        inputs = vlm.prepare(*_first_question(result, vlm))
        with make_method(cell.method, cell.settings)(vlm) as run:
            vlm.prefill(inputs)  # warms up
            seconds, mebibytes = measure(lambda inputs=inputs, vlm=vlm: vlm.prefill(inputs), repeats, vlm.device)
        rows.append({
            "Model": cell.model, "Dataset": cell.dataset, "Method": cell.method,
            "Operations left (%)": 100 * (1 - run.sparsity),
            "Prefill (ms)": 1000 * seconds, "Peak memory (MiB)": mebibytes,
        })  # fmt: skip
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


def _focus(results: list[CellResult]) -> list[CellResult]:
    return [r for r in results if r.cell.kind == "accuracy" and method_label(r.cell) == "focus"]


def _lines(rows: list[dict], y: str, hue: str) -> Figure | None:
    if not rows:
        return None
    grid = sns.relplot(
        pd.DataFrame(rows), x="Layer", y=y, hue=hue, style=hue, col="Dataset", kind="line", markers=True,
        height=2.8, aspect=1.2, palette="colorblind",
    )  # fmt: skip
    grid.set_titles("{col_name}")
    return grid.figure


def average_table(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the data sets, one row a (model, method), of a comparison table."""
    if table.empty:
        return table
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
    """A question of the last data set under Focus, run once more: its frames and the tokens kept."""
    example = _example(results)
    if example is None:
        return None
    vlm, method, media, prompt = example
    with method(vlm) as run:
        answer = vlm.generate(media, prompt)
    kept = {layer: positions.numpy() for layer, positions in run.last.kept.items()}
    title = f"{prompt.splitlines()[0]} → {answer} ({100 * run.sparsity:.0f} % of the computation saved)"
    frames = vlm.frames(media)
    return kept_tokens_figure(frames, vlm.layout(run.last.grid, frames.shape[1:3]), kept, title)


def example_view(results: list[CellResult]) -> None:
    """Show the same question as a view that needs no kernel, with a picture for viewers that run no scripts."""
    example = _example(results)
    if example is None:
        return
    from IPython.display import HTML, Image, display

    from focuslib.explore import view_html, view_png
    from focuslib.view_data import run_view

    vlm, method, media, prompt = example
    data = run_view(vlm, media, prompt, method, method)
    display(HTML(view_html(data)), Image(view_png(data)))


def _example(results: list[CellResult]) -> tuple[VLM, Method, Any, str] | None:
    """The first question that Focus answered of the last data set, with its model and method."""
    chosen = _focus(results)
    if not chosen:
        return None
    cell = chosen[-1].cell
    vlm = load_cell(cell)
    return vlm, make_method(cell.method, cell.settings), *_first_question(chosen[-1], vlm)


def _first_question(result: CellResult, vlm: VLM) -> tuple[Any, str]:
    """The media and prompt of the first question that a cell answered."""
    from focuslib.evaluate import question

    first = result.answered[0]
    return question(result.cell.dataset, vlm.name, first["doc_id"], first["task"])
