"""The picture beside an interactive view: the same state drawn with seaborn, for viewers that run no scripts."""

from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from focuslib.explore.recorder import NEVER, stage_of
from focuslib.explore.view import ViewData
from focuslib.prefill.ops import SITES


def view_figure(data: ViewData, state: dict[str, Any] | None = None) -> Figure:
    """A figure of a view at a state (its frame, layer, site and threshold; missing ones as in a new view).

    Left the frame with each present token's mean best similarity (a trace has none: the share of similar vectors);
    right the sparsity by layer and site, the tokens kept, and the distribution of the similarities with the threshold.
    """
    state = state or {}
    frame, layer, site = state.get("frame", 0), state.get("layer", 0), state.get("site", "q_proj")
    threshold = state.get("threshold", data.recording.threshold)
    with sns.axes_style("ticks"), sns.plotting_context("notebook", font_scale=0.7):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: this may run in a thread
        picture, layers, spread = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
        _frame(figure, picture, data, frame, layer, site)
        _layers(layers, data, threshold)
        _spread(spread, data, layer, site, threshold)
        title = data.question.splitlines()[0] if data.question else data.title
        answers = ", ".join(f"{name}: {answer}" for name, answer in data.answers.items())
        figure.suptitle(f"{title}   {answers}".replace("$", r"\$"), fontsize=9)
    return figure


def _frame(figure: Figure, axis, data: ViewData, frame: int, layer: int, site: str) -> None:
    view, layout = data.recording.sites[site], data.layout
    panel = int(layout.panel.max())  # the detailed one: slices, tiles
    tokens = np.flatnonzero((layout.frame == frame) & (layout.panel == panel))
    height, width = (3, 4) if data.frames is None else data.frames.shape[1:3]
    if data.frames is not None:
        axis.imshow(data.frames[frame], extent=(0, width, height, 0))
    gone = data.recording.dropped[tokens]
    present = (gone == NEVER) | (gone > stage_of(layer, site))
    if view.mean is None:
        values, label = view.similar[layer][tokens] / view.vectors, "share of similar vectors"
    else:
        values, label = view.mean[layer][tokens] / 255, "mean best cosine similarity"
    left, top, wide, tall = (layout.box[tokens] * [width, height, width, height]).T
    corners = np.stack([[left, top], [left + wide, top], [left + wide, top + tall], [left, top + tall]]).transpose(
        2, 0, 1
    )
    cells = PolyCollection(list(corners[present]), array=values[present], cmap="viridis", alpha=0.65)
    cells.set_clim(min(0.9, float(np.quantile(values[present], 0.02)) if present.any() else 0.0), 1)
    axis.add_collection(cells)
    if not present.all():
        axis.add_collection(
            PolyCollection(list(corners[~present]), facecolor="white", edgecolor="grey", hatch="//", alpha=0.6)
        )
    figure.colorbar(cells, ax=axis, label=label, shrink=0.8)
    axis.set(xlim=(0, max(width, (left + wide).max())), ylim=(max(height, (top + tall).max()), 0), xticks=[], yticks=[])
    name = f": {layout.names[frame]}" if layout.names else ""
    axis.set_title(
        f"frame {frame + 1} of {layout.num_frames}{name}, {site}, layer {layer} (hatched: dropped)", fontsize=8
    )


def _layers(axis, data: ViewData, threshold: float | None) -> None:
    numbers = range(len(data.retained))
    chosen = None if data.recording.sites[SITES[0]].above is None else threshold
    colours = sns.color_palette("colorblind", len(SITES) + 1)
    for site, colour, marker in zip(SITES, colours, "osD^v", strict=False):
        axis.plot(
            numbers,
            [100 * data.sparsity(site, n, chosen) for n in numbers],
            marker + "-",
            color=colour,
            label=site,
            ms=4,
        )
    kept = [100 * count / data.recording.grid.length for count in data.retained]
    axis.step(numbers, kept, "--", where="mid", color=colours[-1], label="tokens kept")
    axis.set(xlabel="layer", ylabel="% of all vectors (or tokens)", ylim=(0, 102))
    axis.set_title("sparsity: similar + zero vectors", fontsize=8)
    axis.legend(fontsize=6)


def _spread(axis, data: ViewData, layer: int, site: str, threshold: float | None) -> None:
    view, thresholds = data.recording.sites[site], data.recording.thresholds
    if view.above is None:
        axis.text(
            0.5, 0.5, "similarities are not\nrecorded in a trace", ha="center", va="center", transform=axis.transAxes
        )
        axis.set_axis_off()
        return
    edges = np.linspace(0, 1, 51)
    above = view.above[layer, [int(np.argmin(abs(thresholds - edge))) for edge in edges]]
    above[0], above[-1] = data.recording.grid.length * view.vectors - view.zero[layer].sum(dtype=np.int64), 0
    counts = {"similarity": edges[:-1] + 0.01, "vectors": -np.diff(above)}
    sns.histplot(
        counts, x="similarity", weights="vectors", bins=list(edges), ax=axis, color=sns.color_palette("colorblind")[0]
    )
    axis.axvline(threshold, color="black", linestyle="--")
    axis.set(xlabel="best cosine similarity", ylabel="vectors")
    axis.set_title(f"threshold {threshold:g}: sparsity {100 * data.sparsity(site, layer, threshold):.1f} %", fontsize=8)
