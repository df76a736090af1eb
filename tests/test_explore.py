"""The explorer draws the library's numbers: its data against the trace, its thresholds against the kernels."""

import html
import json
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_view import synthetic_view
from tiny_models import clip, untrained_vlm
from vlm_oracle import read_config, write_checkpoint

from focuslib.errors import UserError
from focuslib.explore.recorder import NEVER, Cancelled, shown_vectors, stage_of, threshold_steps
from focuslib.explore.view import run_view, trace_view
from focuslib.explore.widget import Explorer, View, explore, explore_trace
from focuslib.grid import VisualGrid
from focuslib.kernels.similarity import ZERO, concentrate
from focuslib.methods import Adaptiv, Cmc, Dense, Focus, FrameFusion
from focuslib.models import LlavaVideo, MiniCPMV
from focuslib.models.layout import rows_layout, slices_layout, tiles_layout
from focuslib.models.minicpmv import frame_text
from focuslib.prefill.ops import SITES

FOCUS = Focus(selected_layers=(2, 3, 4, 5, 6), retention=(0.4, 0.3, 0.2, 0.15, 0.1), vector_size=16, m_tile=128)
QUESTION = "What moves?"
rng = np.random.default_rng()


@pytest.fixture(scope="module")
def vlm():
    torch.set_num_threads(1)
    return untrained_vlm()


@pytest.fixture(scope="module")
def data(vlm):
    return run_view(vlm, clip(8), QUESTION, FOCUS, FOCUS)


@pytest.fixture(scope="module")
def run(vlm):
    """The same run without a view."""
    with FOCUS(vlm, trace=True) as run:
        run.answer = vlm.generate(clip(8), QUESTION)
    return run


def unpack(packed: bytes) -> tuple[dict, dict]:
    """What explore.js reads: the header, and a function from an entry of it to its array."""
    raw = zlib.decompress(packed)
    length = int(np.frombuffer(raw[:4], "<u4")[0])
    body = raw[4 + length :]

    def array(entry: dict) -> np.ndarray:
        return np.frombuffer(body, np.dtype(entry["dtype"]), int(np.prod(entry["shape"])), entry["at"]).reshape(
            entry["shape"]
        )

    return json.loads(raw[4 : 4 + length]), array


def test_the_drawn_numbers_are_the_traces(data, run):
    header, array = unpack(data.pack())
    trace, record = run.trace, run.last
    assert header["retained"] == record.retained
    assert header["answers"]["focus"] == run.answer
    assert 1 - header["operations"]["focus"] / header["operations"]["dense"] == pytest.approx(run.sparsity)
    for _ in range(20):
        layer, site = int(rng.integers(8)), SITES[rng.integers(5)]
        drawn, codes = header["sites"][site], trace.codes[site][layer].numpy()
        assert drawn["shown"] == list(range(drawn["vectors"]))
        assert np.array_equal(array(drawn["codes"])[layer], codes)
        assert np.array_equal(array(drawn["zero"])[layer], (codes == ZERO).sum(1))
        assert np.array_equal(array(drawn["similar"])[layer], ((codes != ZERO) & (codes != 0)).sum(1))
        assert data.sparsity(site, layer) == record.counts.layers[layer][site].sparsity(record.grid.length)
        present = np.zeros(record.grid.length, bool)
        present[(codes != ZERO).any(1)] = True
        dropped = array(header["dropped"])
        assert np.array_equal(present, (dropped == NEVER) | (dropped > stage_of(layer, site)))
        # where the pointers end: each code leads one candidate on
        distance = np.array([0] + [d for d, *_ in header["candidates"]])[np.where(codes == ZERO, 0, codes)]
        end = np.arange(len(codes))[:, None] - distance
        for _ in range(64):
            end = np.take_along_axis(end, end, 0)
        assert np.array_equal(trace.group_index(site, layer).numpy() // codes.shape[1], end)


def test_importance_is_what_pruning_went_by(data, run):
    layers = data.recording.importance
    for layer, kept in run.last.kept.items():
        present = layers[layer] > 0
        others = np.setdiff1d(np.flatnonzero(present), kept.numpy())
        assert layers[layer][kept.numpy()].min() >= layers[layer][others].max()


class Catch(Dense):
    """Notes one site's input."""

    def __init__(self, layer: int, site: str):
        object.__setattr__(self, "wanted", (layer, site))

    def at_site(self, prefill, layer, site, x):
        if (layer, site) == self.wanted:
            object.__setattr__(self, "x", x[prefill.visual])
        return x


@pytest.mark.parametrize(("layer", "site"), [(0, "q_proj"), (3, "gate_proj"), (7, "down_proj")])
def test_a_moved_threshold_counts_as_the_library_does(vlm, layer, site):
    """The dense model's inputs do not depend on the threshold, so the kernel can be run at any on the same input."""
    data = run_view(vlm, clip(6), QUESTION, Dense(), FOCUS)
    assert not data.recording.applied
    catch = Catch(layer, site)
    with catch(vlm) as run:
        vlm.prefill(vlm.prepare(clip(6), QUESTION))
    grid = run.last.grid
    for threshold in [0, 0.9, 1, *rng.integers(1, 1000, 10) / 1000]:
        codes = concentrate(
            catch.x, torch.arange(grid.length), grid, threshold=threshold, vector_size=16, m_tile=128
        ).codes
        assert data.sparsity(site, layer, threshold) == (codes != 0).float().mean(dtype=torch.float64)
        drawn = data.recording.sites[site]
        step = np.argmin(abs(data.recording.thresholds - threshold))
        assert np.array_equal(drawn.steps[layer] > step, ((codes != 0) & (codes != ZERO)).numpy())


def test_a_threshold_off_the_steps_has_its_own():
    data = synthetic_view(2, 3, 3, 2, dict.fromkeys(SITES, 2))
    assert len(data.recording.thresholds) == 1001
    assert 0.85555 in threshold_steps(0.85555)


@pytest.mark.parametrize(
    ("method", "kinds"), [(Cmc(), 4), (Adaptiv(threshold=0.3), 3), (FrameFusion(), 3), (Dense(), 0)]
)
def test_every_method_has_a_view(vlm, method, kinds):
    data = run_view(vlm, clip(9), QUESTION, method, FOCUS)
    with method(vlm) as run:
        answer = vlm.generate(clip(9), QUESTION)
    assert data.answers[method.name] == answer and data.retained == run.last.retained
    assert any("does not use" in note for note in data.notes)
    header, array = unpack(data.pack())
    if not kinds:
        assert "links" not in header
        return
    target, kind = array(header["links"]["target"]), array(header["links"]["kind"])
    assert len(header["links"]["kinds"]) == kinds and kind.max() < kinds
    own = np.arange(len(target))
    details = run.last.details
    if isinstance(method, Cmc):
        match = details["linear_match"].numpy()
        assert np.array_equal(target, np.where(match < 0, own, match))
        assert np.array_equal(kind == 0, match < 0)
    elif isinstance(method, Adaptiv):
        assert (
            np.array_equal(kind, details["direction"].numpy())
            and (kind > 0).sum() == (array(header["dropped"]) >= 0).sum()
        )
    else:
        assert np.array_equal(target, details["merge_root"].numpy())


def test_a_recorded_trace_opens_without_the_model(data, run, tmp_path):
    path = tmp_path / "sample.trace"
    run.trace.save(path)
    opened = trace_view(path, clip(8))
    assert opened.retained == data.retained
    assert np.array_equal(opened.recording.dropped, data.recording.dropped)
    for site in SITES:
        for name in ("codes", "similar", "zero", "follows"):
            assert np.array_equal(
                getattr(opened.recording.sites[site], name), getattr(data.recording.sites[site], name)
            ), name
    view = explore_trace(path)
    assert "DecompressionStream" in view.html() and view.png().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="not a whole trace"):
        (tmp_path / "cut.trace").write_bytes(path.read_bytes()[:-5])
        explore_trace(tmp_path / "cut.trace")
    with pytest.raises(UserError, match="give its own clip"):
        explore_trace(path, clip(3))


def test_a_view_is_a_page_and_a_picture(data, tmp_path):
    view = View(data)
    page = view.save(tmp_path / "view.html")
    text = page.read_text()
    assert len(text.encode()) <= 3e6
    assert not re.search(r'(?:src|href)\s*=\s*["\']|@import|url\(|fetch\(|XMLHttpRequest|import\(', text)  # no network
    first = view.png()
    view.canvas.state = {"layer": 5, "site": "down_proj", "frame": 3, "threshold": 0.5}
    assert first.startswith(b"\x89PNG") and view.png() != first
    assert '"layer": 5' in view.html()


def test_a_large_page_is_sub_sampled_and_says_so():
    """28 layers of a 7B model on 64 frames: two layers are made, the others take as much."""
    vectors = {"q_proj": 112, "query": 112, "o_proj": 112, "gate_proj": 112, "down_proj": 592}
    shown = {site: len(some) for site, some in shown_vectors(64 * 182, 28, vectors).items()}
    assert 4 <= shown["query"] < 112
    sizes = [len(synthetic_view(64, 13, 14, layers, shown, side=384).pack()) for layers in (1, 2)]
    assert 4 / 3 * (sizes[0] + 27 * (sizes[1] - sizes[0])) <= 40e6
    data = synthetic_view(2, 3, 3, 1, dict.fromkeys(SITES, 8))
    data.recording.sites["query"].shown = np.arange(4)
    assert any("query: 4 of 8 vectors" in note for note in unpack(data.pack())[0]["notes"])


def test_an_unreadable_file_is_one_line_in_the_view(vlm, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for path in (broken, tmp_path / "missing.png"):
        view = explore(vlm, str(path), QUESTION, FOCUS)
        assert view.data is None and str(path) in view.error and "\n" not in view.error
        assert html.escape(view.error) in view.controls.status.value
        with pytest.raises(UserError, match="nothing yet"):
            view.html()


def test_the_users_own_image_opens(vlm, tmp_path):
    Image.fromarray(clip(1)[0]).resize((120, 80)).save(tmp_path / "own.jpg")
    view = explore(vlm, tmp_path / "own.jpg", QUESTION, FOCUS)
    assert not view.error and view.data.layout.panels == ("whole image", "tiles")
    view.run(tmp_path / "own.jpg", QUESTION, Cmc())
    assert "give it a video" in view.error and view.data is not None


def test_the_controls_run_the_model_again(vlm):
    view = Explorer(vlm, clip(4), QUESTION, FOCUS, FOCUS)
    assert view.controls.chosen()[2] == FOCUS
    view.controls.begin()
    view.controls._thread.join()
    first = view.data
    assert first is not None and view.controls.status.value.count("done")
    view.controls.method.value = "adaptiv"
    view.controls._fields["threshold"].value = "0.2"
    assert view.controls.chosen()[2] == Adaptiv(threshold=0.2)
    view.controls._fields["threshold"].value = "much"
    view.controls.begin()
    view.controls._thread.join()
    assert "is not float" in view.controls.status.value and view.data is first


def test_a_run_can_be_cancelled_and_leaves_the_model_as_it_was(vlm):
    inputs, seen = vlm.prepare(clip(4), QUESTION), []
    before = vlm.prefill(inputs)
    with pytest.raises(Cancelled):
        run_view(
            vlm,
            clip(4),
            QUESTION,
            FOCUS,
            FOCUS,
            progress=lambda share, text: seen.append(share),
            cancelled=lambda: len(seen) > 6,
        )
    assert seen == sorted(seen) and 0 < seen[-1] < 1
    assert torch.equal(vlm.prefill(inputs), before)


def test_layouts_draw_tokens_where_they_are():
    video = rows_layout(VisualGrid(0, 2 * 6, 2, 2, 3, 6, 3), newline=True)
    assert video.frame.tolist() == [0] * 6 + [1] * 6
    assert np.allclose(video.box[:3, 0], [0, 0.5, 1]) and np.allclose(video.box[[0, 3], 1], [0, 0.5])
    image = tiles_layout(3, 4, 5)
    assert image.panel.tolist() == [0] * 9 + [1] * 20 and image.num_frames == 1
    assert np.allclose(image.box[9 + 4, 0], 1)
    for slices, size in (((2, 1), 16 * 3 + 7), ((1, 2), 16 * 3 + 8), ((0, 0), 16 + 3)):
        text = frame_text(*slices, 16) + "\n"
        tokens = re.findall(r"<[^>]+>|\n", text)
        layout = slices_layout(2, len(tokens), 16, slices)
        assert len(tokens) == size and len(layout.box) == 2 * size
        inside = layout.box[:size, 0] < 1
        assert [token == "<unk>" for token in tokens] == inside.tolist()
        if slices[0]:
            second = layout.box[:size][inside][32:]
            assert np.allclose(second[:, 0 if slices == (2, 1) else 1].min(), 0.5)


def test_adapters_say_their_layout(tmp_path):
    video = LlavaVideo.load(
        write_checkpoint("llava_video", tmp_path / "video"),
        vision_config=read_config("llava_video")["_tiny_vision_config"],
    )
    layout = video.layout(video.video_grid(4, 3), (90, 160))
    columns = video.patches_per_side // 2 + 1
    assert layout.num_frames == 3 and np.allclose(layout.box[columns - 1 :: columns, 0], 1)
    frames = MiniCPMV.load(write_checkpoint("minicpmv", tmp_path / "frames"))
    queries = frames.model.config.query_num
    layout = frames.layout(frames.video_grid(4, 2 * (3 * queries + 7), 2), (720, 1280))
    assert layout.panels == ("whole frame", "slices") and layout.num_frames == 2
    assert (layout.panel == 1).sum() == 2 * (2 * queries + 5)


def test_a_grid_wider_than_a_frame_is_drawn_as_one_picture():
    """The published grid of an image has more "frames" than its tokens are whole frames of."""
    assert rows_layout(VisualGrid(0, 100, 3, 9, 10, 9, 10)).num_frames == 1
