"""Figures of the experiments, drawn from the cells' results."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from focuslib.experiments.store import CellResult, Outcome
from focuslib.explore.page import view_html, view_png
from focuslib.explore.view import ViewData
from focuslib.models.layout import TokenLayout
from focuslib.prefill.ops import SITES
from focuslib.report.tables import comparison_table, method_label


def few_colours(figure: Figure) -> Image:
    """A figure as a picture of 64 colours, an eighth of the size: for those that show frames of clips."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight", pil_kwargs={"compress_level": 0})
    plt.close(figure)
    # the octree keeps the few pixels of small marks, which the median cut gives up
    picture = PIL.Image.open(full).convert("RGB").quantize(64, PIL.Image.Quantize.FASTOCTREE)
    picture.save(small, format="png", optimize=True)
    return Image(small.getvalue())


def show(table: pd.DataFrame) -> None:
    """Show a table in a notebook: two decimals, no index, empty cells empty."""
    if table.empty:
        print("no such results")
        return
    display(table.style.format(precision=2, na_rep="").hide(axis="index"))


def site_sparsity_figure(results: list[CellResult]) -> Figure | None:
    """Sparsity of each GEMM site by layer, mean over the questions, one panel a data set."""
    rows = [
        {"Dataset": r.cell.dataset, "Site": site, "Layer": layer, "Sparsity (%)": 100 * value}
        for r in results
        if r.cell.kind == "accuracy" and method_label(r.cell) == "focus"
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


def kept_tokens_figure(frames: np.ndarray, layout: TokenLayout, kept: dict[str, np.ndarray], title: str) -> Figure:
    """A clip with its pruned tokens darkened: one row a pruning layer, one column a frame (at most eight).

    frames: [F, H, W, 3] uint8. layout: where the S visual tokens lie in them; where they overlap (an image and its
    tiles), brightness is the share that is kept. kept: layer → positions (0 … S − 1) that are left after it.
    """
    rows = {f"after layer {layer}": np.asarray(left) for layer, left in kept.items()}
    return kept_rows_figure(frames, layout, rows, title)


def kept_rows_figure(
    frames: np.ndarray, layout: TokenLayout, rows: dict[str, np.ndarray], title: str, side: float = 1.4
) -> Figure:
    """The same with a label of one's own for each row: label → positions that are left. side: of a frame, inches."""
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames)), dtype=int)
    everything = np.arange(len(layout.frame))
    rows = {"input": everything, **rows}
    height, width = frames.shape[1:3]
    gap = max(1, width // 32)
    # one picture of all: axes of their own for each frame take matplotlib a hundred times as long
    sheet = np.full(((height + gap) * len(rows) - gap, (width + gap) * len(shown) - gap, 3), 255, np.uint8)
    for row, positions in enumerate(rows.values()):
        present = np.isin(everything, positions)
        for column, frame in enumerate(shown):
            light = 0.15 + 0.85 * _share_kept(layout, frame, present, (height, width))[..., None]
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = (frames[frame] * light).astype(np.uint8)
    figure, axis = plt.subplots(
        figsize=(side * len(shown) + 1.5, (side * height / width + 0.1) * len(rows)), layout="constrained"
    )
    axis.imshow(sheet)
    axis.set_frame_on(False)
    axis.xaxis.tick_top()
    places = np.arange(len(shown)) * (width + gap) + width / 2
    axis.set_xticks(places, [f"frame {frame}" for frame in shown], fontsize=8)
    labels = [f"{label}\n{len(positions)} tokens" for label, positions in rows.items()]
    axis.set_yticks(np.arange(len(rows)) * (height + gap) + height / 2, labels, fontsize=8)
    axis.tick_params(length=0)
    axis.set_anchor("N")
    figure.suptitle(title, fontsize=9, wrap=True)
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


def _lines(rows: list[dict], y: str, hue: str) -> Figure | None:
    if not rows:
        return None
    grid = sns.relplot(
        pd.DataFrame(rows), x="Layer", y=y, hue=hue, style=hue, col="Dataset", kind="line", markers=True,
        height=2.8, aspect=1.2, palette="colorblind",
    )  # fmt: skip
    grid.set_titles("{col_name}")
    return grid.figure


def example_clip(outcome: Outcome) -> Figure | None:
    """The question of the experiment's view cell: its frames and the tokens that pruning keeps."""
    data = _example(outcome)
    if data is None or data.frames is None:
        return None
    (name, answer) = list(data.answers.items())[-1]
    saved = 1 - data.operations[name] / data.operations["dense"]
    title = f"{data.question.splitlines()[0]} → {answer} ({100 * saved:.0f} % of the computation saved)"
    kept = {layer: np.asarray(positions) for layer, positions in data.kept.items()}
    return kept_tokens_figure(data.frames, data.layout, kept, title)


def example_view(outcome: Outcome) -> None:
    """Show the same question as a view that needs no kernel, with a picture for viewers that run no scripts."""
    data = _example(outcome)
    if data is not None:
        display(HTML(view_html(data)), Image(view_png(data)))


def _example(outcome: Outcome) -> ViewData | None:
    views = [result.view for result in outcome.results if result.view]
    return ViewData.load(outcome.folder / "cells" / views[-1]) if views else None
