"""The explorer in a real browser: live in JupyterLab, and as a page without a network."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCREENSHOTS
from PIL import Image
from synthetic_view import synthetic_view
from test_media import write_video as write_webm
from tiny_families import write_checkpoint
from tiny_models import clip

from focuslib.explore.widget import View, default_method, explore, tiny_examples
from focuslib.methods import Evs, Focus, PyramidDrop
from focuslib.models import load
from focuslib.tasks.tinyvideo.build import write_video

VECTORS_7B = {"q_proj": 112, "query": 112, "o_proj": 112, "gate_proj": 112, "down_proj": 592}
MEASURE = """(change) => {
  const explorer = document.querySelector('.fx').parentElement.explorer, times = [];
  for (let n = 0; n < 40; n++) {
    const {pictures, layers} = explorer.view;
    explorer.set({[change]: {frame: n % pictures.count, layer: n % layers, threshold: 0.5 + 0.01 * n}[change]});
    const start = performance.now();
    explorer.redraw();
    document.querySelector('.fx-frame').getContext('2d').getImageData(0, 0, 1, 1);  // waits for the drawing
    document.querySelector('.fx-strip').getContext('2d').getImageData(0, 0, 1, 1);
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[20];
}"""


def pixels(page, name: str) -> str:
    """What a canvas shows now, after the pending redraw."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate(f"() => document.querySelector('canvas.fx-{name}').toDataURL()")


def shown_sparsity(page) -> float:
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return float(page.locator(".fx-sparsity").get_attribute("data-value"))


def drive(page) -> None:
    """Move every slider of a view with the keyboard; the canvases change each time."""
    page.evaluate(
        "(state) => document.querySelector('.fx').parentElement.explorer.set(state)",
        {"frame": 0, "layer": 0, "site": "q_proj", "overlay": "similarity"},
    )
    for control, canvas in (("frames", "frame"), ("layer", "frame"), ("layer", "layers"), ("threshold", "histogram")):
        before = pixels(page, canvas)
        page.locator(f".fx-{control}").press("ArrowLeft" if control == "threshold" else "ArrowRight")
        assert pixels(page, canvas) != before, (control, canvas)
    for control, choice, canvas in (
        ("site", "down_proj", "histogram"),
        ("overlay", "kinds", "frame"),
        ("overlay", "follows", "strip"),
    ):
        before = pixels(page, canvas)
        page.locator(f".fx-{control}").select_option(choice)
        assert pixels(page, canvas) != before, (control, canvas)
    before = pixels(page, "frame")
    page.locator(".fx").focus()
    page.keyboard.press("ArrowRight")
    assert pixels(page, "frame") != before


@pytest.fixture(scope="module")
def view(vlm):
    media, question = next(iter(tiny_examples(1).values()))
    return explore(vlm, media, question)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_saved_page_works_without_a_network(page_of, view, tmp_path, scheme):
    path = view.save(tmp_path / "view.html")
    assert path.stat().st_size <= 3e6
    page = page_of(offline=True, color_scheme=scheme)
    page.goto(path.as_uri())
    page.wait_for_selector(".fx-strip")
    page.screenshot(path=SCREENSHOTS / f"page-{scheme}.png")
    for layer, site, threshold in ((0, "q_proj", 0.5), (3, "down_proj", 0.973), (7, "query", 0.85)):
        page.evaluate(
            "(state) => document.querySelector('.fx').parentElement.explorer.set(state)",
            {"layer": layer, "site": site, "threshold": threshold},
        )
        assert shown_sparsity(page) == view.data.sparsity(site, layer, threshold)
    drive(page)
    page.evaluate(
        "(state) => document.querySelector('.fx').parentElement.explorer.set(state)",
        {"overlay": "group", "token": 60, "layer": 1, "frame": 1},
    )
    pixels(page, "frame")
    page.screenshot(path=SCREENSHOTS / f"page-{scheme}-group.png")


def test_several_media_are_named(page_of, tmp_path):
    """Two videos and three images in one prompt: each frame's picture under its own tokens, and whose it is."""
    other = load(write_checkpoint("qwen3_vl", tmp_path / "qwen3_vl"), device="cpu")
    sizes = [(128, 64), (64, 128), (96, 96)]
    images = [Image.fromarray(clip(1, seed)[0]).resize(size) for seed, size in enumerate(sizes)]
    media = [clip(6, 3), images[0], clip(4, 4), *images[1:]]
    method = Focus(selected_layers=(0, 2), retention=(0.7, 0.5), vector_size=8, m_tile=64)
    several = explore(other, media, "<video> then <image> and <video>, <image>, <image>: what moves?", method=method)
    page = page_of(offline=True)
    page.goto(several.save(tmp_path / "view.html").as_uri())
    page.wait_for_selector(".fx-strip")
    names = ["video 1, frame 1", "video 1, frame 2", "video 1, frame 3", "image 1", "video 2, frame 1",
             "video 2, frame 2", "image 2", "image 3"]  # fmt: skip
    seen = set()
    for frame, name in enumerate(names):
        page.evaluate("(frame) => document.querySelector('.fx').parentElement.explorer.set({frame})", frame)
        seen.add(pixels(page, "frame"))
        assert page.locator(".fx-frameno").text_content() == f"frame {frame + 1} of 8: {name}"
    assert len(seen) == len(names)
    page.screenshot(path=SCREENSHOTS / "page-several-media.png")


@pytest.mark.parametrize("method", [PyramidDrop(layers=(1, 2, 4)), Evs()], ids=lambda method: method.name)
def test_what_a_method_ranks_by(page_of, vlm, tmp_path, method):
    """The heat map is what such a view opens with; it changes from stage to stage, and says what it shows."""
    media, question = next(iter(tiny_examples(1).values()))
    view = explore(vlm, media, question, method)
    page = page_of(offline=True)
    page.goto(view.save(tmp_path / "view.html").as_uri())
    page.wait_for_selector(".fx-strip")
    assert page.locator(".fx-overlay").input_value() == "ranking"
    pixels(page, "frame")
    page.screenshot(path=SCREENSHOTS / f"ranking-{method.name}.png")
    seen = []
    for ranking in view.data.recording.rankings:
        page.evaluate(
            "(layer) => document.querySelector('.fx').parentElement.explorer.set({layer, frame: 2})", ranking.stage // 2
        )
        seen.append(pixels(page, "frame"))
        assert ranking.by in page.locator(".fx-legend").inner_text()
    assert len(set(seen)) == len(view.data.recording.rankings) == (3 if method.name == "pyramiddrop" else 1)


def test_redraws_are_quick(page_of, view, tmp_path):
    """≤ 16 ms for the embedded model, ≤ 50 ms for 64 frames of 182 tokens (median of 40, the drawing waited for)."""
    large = View(synthetic_view(64, 13, 14, 3, VECTORS_7B, side=384))
    for name, shown, most in (("tiny", view, 16), ("large", large, 50)):
        page = page_of(offline=True)
        page.goto(shown.save(tmp_path / f"{name}.html").as_uri())
        page.wait_for_selector(".fx-strip")
        times = {change: page.evaluate(MEASURE, change) for change in ("frame", "layer", "threshold")}
        print(f"{name}: median redraw in ms {times}")
        page.screenshot(path=SCREENSHOTS / f"page-{name}.png")
        assert max(times.values()) <= most, times


@pytest.fixture
def lab(tmp_path, vlm):
    """The address of a copy of the notebook in a JupyterLab, with the very model that the test has."""
    notebook = json.loads((ROOT / "notebooks" / "explore.ipynb").read_text())
    vlm.model.save_pretrained(tmp_path / "checkpoint")
    vlm.tokenizer.save_pretrained(tmp_path / "checkpoint")
    source = "".join(notebook["cells"][1]["source"])
    assert "checkpoint = None" in source
    notebook["cells"][1]["source"] = source.replace(
        "checkpoint = None", f"checkpoint = {str(tmp_path / 'checkpoint')!r}"
    )
    (SCREENSHOTS / "explore.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kinds = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    folders = {kind: str(tmp_path / kind) for kind in kinds}
    page_config = tmp_path / "JUPYTER_CONFIG_DIR" / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    page_config.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
         "--ServerApp.port_retries=0", f"--ServerApp.root_dir={SCREENSHOTS}", "--IdentityProvider.token=focus",
         "--LabApp.expose_app_in_browser=True"],
        env={**os.environ, **folders}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for_port(port, server)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=focus&reset"
    finally:
        server.terminate()
        server.wait(30)


def wait_for_port(port: int, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "jupyter lab ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("jupyter lab did not start")


def test_the_notebook_in_jupyterlab(lab, page_of, vlm, tmp_path):
    page = page_of()
    page.set_default_timeout(90_000)
    page.goto(lab)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector("text=| Idle")
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    start = time.perf_counter()
    page.evaluate("() => { window.jupyterapp.commands.execute('runmenu:run-all') }")
    page.wait_for_selector(".fx-strip")
    print(f"first view after {time.perf_counter() - start:.1f} s, of which the imports are most")
    page.locator(".fx").scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "lab-light.png")
    picture = page.locator(".jp-RenderedImage img").get_attribute("src")

    # the shown sparsity is the library's: the first site's inputs are the same under every threshold
    before = pixels(page, "histogram")
    place = page.locator(".fx-histogram").bounding_box()
    page.mouse.move(place["x"] + 0.6 * place["width"], place["y"] + 40)
    page.mouse.down()
    page.mouse.move(place["x"] + 0.7 * place["width"], place["y"] + 40, steps=4)
    page.mouse.up()
    assert pixels(page, "histogram") != before
    threshold = float(page.locator(".fx-threshold").input_value())
    media, question = next(iter(tiny_examples(1).values()))
    method = default_method("focus", vlm)
    with Focus(**{**method.settings(), "similarity_threshold": threshold})(vlm) as run:
        vlm.prefill(vlm.prepare(media, question))
    assert shown_sparsity(page) == run.last.counts.layers[0]["q_proj"].sparsity(run.last.grid.length)
    drive(page)
    page.wait_for_function("(before) => document.querySelector('.jp-RenderedImage img').src !== before", arg=picture)

    # the model again: another question, an unreadable file, the user's own video
    page.locator(".widget-textarea textarea").fill("What color is shown?")
    page.locator("button.jupyter-button:has-text('Run')").click()
    page.wait_for_selector(".fx-question:has-text('What color')")
    clip_field = page.locator(".widget-text input[type=text]").first
    clip_field.fill("missing.mp4")
    clip_field.press("Enter")
    page.locator("button.jupyter-button:has-text('Run')").click()
    page.wait_for_selector("text=missing.mp4: no such video file")
    write_video(tmp_path / "own.mp4", clip(5))
    write_webm(tmp_path / "own.webm", count=7, fps=4, size=(96, 96), codec="libvpx-vp9")
    Image.fromarray(clip(1)[0]).save(tmp_path / "own.png")
    for name, frames in (("own.mp4", 5), ("own.webm", 7), ("own.png", 1)):
        with page.expect_file_chooser() as chooser:
            page.locator("button.widget-upload").click()
        chooser.value.set_files(tmp_path / name)
        page.wait_for_function(
            "(name) => [...document.querySelectorAll('.widget-text input')].some((f) => f.value.endsWith(name))",
            arg=name,
        )
        page.locator("button.jupyter-button:has-text('Run')").click()
        page.wait_for_selector(f".fx-frameno:has-text('of {frames}')")
    # a new run has its own threshold
    assert float(page.locator(".fx-threshold").input_value()) == method.similarity_threshold

    # a long run is cancelled; the view stays
    page.locator(".widget-dropdown select").first.select_option(index=4)  # a clip of 32 frames
    page.locator(".widget-dropdown select").nth(1).select_option("cmc")
    page.locator("button.jupyter-button:has-text('Run')").click()
    page.locator("button.jupyter-button:has-text('Cancel'):enabled").click()
    page.wait_for_selector("text=cancelled; the view shows the run before")
    assert page.locator(".fx-frameno").inner_text().endswith("of 1")

    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.locator(".fx").scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('.fx').parentElement.explorer.theme === 'dark'")
    pixels(page, "frame")
    page.screenshot(path=SCREENSHOTS / "lab-dark.png")
    page.locator(".widget-textarea").scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "lab-controls.png")
