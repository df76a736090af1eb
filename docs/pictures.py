"""Draw the pictures of the site's method pages: python docs/pictures.py (a minute; CPU, offline).

One motion clip of the embedded benchmark under each method, with its settings of params/methods.yaml. With the path of
a Chromium as argument (and the extra [browser]) also the explorer, as it is seen there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from focuslib.evaluation.settings import method_settings
from focuslib.explore.page import page_html, view_html, view_png
from focuslib.explore.view import ViewData, run_view
from focuslib.methods import Focus, Method
from focuslib.methods.settings import make_method
from focuslib.models import VLM, TinyOnevision
from focuslib.prefill.record import Links
from focuslib.report.figures import kept_rows_figure, kept_tokens_figure
from focuslib.tasks.tinyvideo.build import load_docs
from focuslib.tasks.tinyvideo.questions import prompt

IMAGES = Path(__file__).parent / "images"
DATASET, FRAMES = "tinyvideo_motion", 8
COLOURS = ("none", "#0072b2", "#d55e00", "#cc79a7")  # kept as it is; then one a kind of link


def main() -> None:
    """Draw every picture into docs/images/."""
    vlm = TinyOnevision.load()
    save(grid_figure(), "grid")
    save(sites_figure(), "sites")
    views = {name: view(vlm, name) for name in ("focus", "cmc", "adaptiv", "framefusion")}
    focus = views["focus"]
    kept = {layer: np.asarray(positions) for layer, positions in focus.kept.items()}
    save(kept_tokens_figure(focus.frames, focus.layout, kept, focus.question.splitlines()[0]), "focus-sec", dpi=62)
    IMAGES.joinpath("focus-sic.png").write_bytes(view_png(focus, {"frame": 4, "layer": 1}))
    if sys.argv[1:]:
        draw_explorer(focus, sys.argv[1])
    for name in ("cmc", "adaptiv", "framefusion"):
        save(links_figure(views[name]), name)
    for name in ("fastv", "evs", "vidcom2", "pyramiddrop", "dycoke", "visionzip", "flashvid"):
        data = view(vlm, name, {"target_sparsity": 0.5})
        left = {"left": np.asarray(list(data.kept.values())[-1])}
        save(kept_rows_figure(data.frames, data.layout, left, data.question.splitlines()[0]), name, dpi=62)


def draw_explorer(data: ViewData, chromium: str) -> None:
    """The explorer on a view, in a browser."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "view.html"
        path.write_text(page_html("explorer", view_html(data, {"frame": 4, "layer": 1})))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 690}, color_scheme="light")
        page.goto(path.as_uri())
        page.wait_for_selector(".fx-frame")
        page.wait_for_timeout(500)  # until it is drawn
        page.screenshot(path=IMAGES / "explorer.png")


def view(vlm: VLM, name: str, settings: dict | None = None) -> ViewData:
    """What the explorer shows of the clip under a method."""
    docs = load_docs(DATASET.removeprefix("tinyvideo_"), "test")
    doc = min((doc for doc in docs if doc["question_type"] == "direction"), key=lambda doc: doc["id"])
    method, probe = _method(name, vlm, settings), _method("focus", vlm)
    assert isinstance(probe, Focus)
    if name == "focus":
        method = probe
    return run_view(vlm, doc["video"], prompt(doc["question"], doc["options"]), method, probe)


def _method(name: str, vlm: VLM, settings: dict | None = None) -> Method:
    return make_method(name, method_settings(name, vlm.name, DATASET) | (settings or {}))


def links_figure(data: ViewData) -> Figure:
    """The clip's frames, each token coloured by what became of it."""
    links = data.links
    assert links is not None and data.frames is not None
    height, width = data.frames.shape[1:3]
    figure, axes = plt.subplots(2, FRAMES, figsize=(1.15 * FRAMES, 2.9), layout="constrained")
    for frame in range(FRAMES):
        for axis in axes[:, frame]:
            axis.imshow(data.frames[frame], extent=(0, width, height, 0))
            axis.set(xticks=[], yticks=[])
        tokens = np.flatnonzero(data.layout.frame == frame)
        axes[1, frame].add_collection(_cells(data.layout.box[tokens] * [width, height, width, height], links, tokens))
        axes[0, frame].set_title(f"frame {frame}", fontsize=8)
    axes[0, 0].set_ylabel("input", fontsize=8)
    axes[1, 0].set_ylabel("tokens", fontsize=8)
    handles = []
    for number, (kind, colour) in enumerate(zip(links.kinds, COLOURS, strict=False)):
        if count := int((links.kind == number).sum()):
            handles.append(Patch(facecolor=colour, edgecolor="#888888", alpha=0.8, label=f"{kind}: {count}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _cells(boxes: np.ndarray, links: Links, tokens: np.ndarray) -> PolyCollection:
    left, top, wide, tall = boxes.T
    corners = np.stack([[left, top], [left + wide, top], [left + wide, top + tall], [left, top + tall]])
    colours = [COLOURS[kind] for kind in links.kind[tokens]]
    return PolyCollection(
        list(corners.transpose(2, 0, 1)), facecolors=colours, edgecolors="white", linewidths=0.4, alpha=0.65
    )


def grid_figure() -> Figure:
    """Which tokens a 2 × 2 × 2 block compares a token with."""
    figure, axes = plt.subplots(1, 2, figsize=(5.2, 2.6), layout="constrained")
    for axis, title, offset in zip(axes, ("frame f − 1", "frame f"), (1, 0), strict=True):
        for row in range(4):
            for column in range(5):
                candidate = row in (1, 2) and column in (2, 3)
                own = offset == 0 and (row, column) == (2, 3)
                colour = "#d55e00" if own else "#7fb8da" if candidate else "#eeeeee"
                axis.add_patch(Rectangle((column, row), 0.92, 0.92, facecolor=colour))
        axis.set(xlim=(0, 5), ylim=(4, 0), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
        axis.set_frame_on(False)
    handles = [Patch(facecolor="#d55e00", label="token p"), Patch(facecolor="#7fb8da", label="its seven candidates")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def sites_figure() -> Figure:
    """A decoder layer with its five GEMM sites and two places where tokens can be dropped."""
    figure, axis = plt.subplots(figsize=(9, 1.75), layout="constrained")
    steps = [
        ("drop", ""), ("norm", ""), ("q, k, v\nproj", "q_proj"), ("QKᵀ, PV", "query"), ("o_proj", "o_proj"), ("+", ""),
        ("drop", ""), ("norm", ""), ("gate, up\nproj", "gate_proj"), ("down_proj", "down_proj"), ("+", ""),
    ]  # fmt: skip
    left, ends = 0.0, []
    for label, site in steps:
        wide = 0.5 if label == "+" else 0.72 if label in ("norm", "drop") else 1.15
        colour = "#f3c9a5" if label == "drop" else "#b9d9ec" if site else "#eeeeee"
        axis.add_patch(Rectangle((left, 0), wide, 1, facecolor=colour, edgecolor="#666666", linewidth=0.8))
        axis.text(left + wide / 2, 0.5, label, ha="center", va="center", fontsize=9, color="black")
        if site:
            axis.text(left, 1.16, f"▾ {site}", ha="left", va="bottom", fontsize=8, color="#0072b2")
        ends.append(left + wide)
        left += wide + 0.26
    for end in ends[:-1]:
        axis.annotate("", (end + 0.26, 0.5), (end, 0.5), arrowprops={"arrowstyle": "->", "color": "#666666"})
    axis.text(
        0, -0.25, "orange: where a method may drop tokens     blue: a GEMM, its site (the input) named above it",
        fontsize=8, va="top",
    )  # fmt: skip
    axis.set(xlim=(-0.1, left), ylim=(-0.7, 1.7))
    axis.set_axis_off()
    return figure


def save(figure: Figure, name: str, dpi: int = 120) -> None:
    """Write a picture in 256 colours, which halves it."""
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=dpi, facecolor="white")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
