"""The explorer on every grid: each token on its own frame, tile or image, and the neighbour it follows."""

import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import loaded, picture, video

from focuslib import cli
from focuslib.explore.view import ViewData, run_view, trace_view
from focuslib.hardware.traces import read_counts
from focuslib.kernels.similarity import ITSELF, ZERO
from focuslib.methods import Cmc, Focus
from focuslib.models.layout import grid_layout
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import Trace

torch.set_num_threads(1)
FOCUS = Focus(selected_layers=(0, 2), retention=(0.6, 0.3), similarity_threshold=0.5, vector_size=8, m_tile=64)


def header_of(data: ViewData) -> tuple[dict, bytes]:
    raw = zlib.decompress(data.pack())
    size = int(np.frombuffer(raw[:4], "<u4")[0])
    return json.loads(raw[4 : 4 + size]), raw[4 + size :]


def test_a_video_of_several_runs(family_checkpoint, tmp_path):
    vlm, frames = loaded(family_checkpoint("qwen3_vl")), video(6)
    data = run_view(vlm, frames, "What moves?", FOCUS, FOCUS, max_new_tokens=2)
    header, _ = header_of(data)
    assert header["names"] == []
    assert "neighbours" not in header and header["pictures"]["count"] == 3
    assert np.array_equal(data.frames, frames[::2])  # two frames a token
    assert data.layout.frame.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert data.layout.box[5].tolist() == [0.25, 0.25, 0.25, 0.25]
    data.save(tmp_path / "view.npz")
    again = ViewData.load(tmp_path / "view.npz")
    assert again.recording.grid == data.recording.grid and again.pack() == data.pack()


@pytest.mark.parametrize("method", [FOCUS, Cmc(linear_threshold=0.7, interval=3, i_frame=1)], ids=["focus", "cmc"])
def test_several_media_on_sheets_of_one_size(family_checkpoint, tmp_path, method):
    vlm = loaded(family_checkpoint("internvl"))
    media = [video(4), picture(96, 48), picture(20, 40)]
    inputs = vlm.prepare(media, "What moves?")
    assert inputs.shown == (0, 1, 1, 2, 2)
    data = run_view(vlm, media, "What moves?", method, FOCUS, max_new_tokens=2)
    assert data.frames.shape == (4 + 2 + 2, 48, 96, 3)
    layout = data.layout
    assert (layout.frame == sorted(layout.frame)).all() and set(layout.frame) == set(range(8))
    assert layout.box.min() >= 0 and (layout.box[:, :2] + layout.box[:, 2:]).max() <= 1 + 1e-6
    tall = layout.box[layout.frame == 7]  # half as wide as high, in the middle of a sheet twice as wide as high
    np.testing.assert_allclose([tall[:, 0].min(), tall[:, 1].min()], [0.375, 0], atol=1e-6)
    np.testing.assert_allclose(tall[:, 2:] * 2, np.tile([0.25, 1], (4, 1)), atol=1e-6)
    header, arrays = header_of(data)
    parts = [f"image {image}, part {part}" for image in (1, 2) for part in (1, 2)]  # the tiles, and the whole
    assert header["names"] == [*(f"video 1, frame {number}" for number in range(1, 5)), *parts]
    table = header["neighbours"]
    count, tokens = table["shape"]
    near = np.frombuffer(arrays, "<i4", count * tokens, table["at"]).reshape(count, tokens)
    grid = data.recording.grid
    assert np.array_equal(near, grid.candidates(torch.arange(tokens), 2, 2).numpy())
    codes = data.recording.sites["q_proj"].codes
    follows = (codes != ITSELF) & (codes != ZERO)
    assert follows.any()
    _, token, _ = np.nonzero(follows)
    target = near[codes[follows].astype(int) - 1, token]
    assert (target >= 0).all() and (grid.medium_of().numpy()[target] == grid.medium_of().numpy()[token]).all()
    data.save(tmp_path / "view.npz")
    assert ViewData.load(tmp_path / "view.npz").pack() == data.pack()


def test_a_trace_of_tiles_is_drawn_without_its_model(family_checkpoint, tmp_path):
    vlm = loaded(family_checkpoint("smolvlm"))
    inputs = vlm.prepare(picture(96, 96), "What is it?")
    with FOCUS(vlm, trace=True) as run:
        vlm.prefill(inputs)
    run.trace.save(tmp_path / "tiles.trace")
    data = trace_view(tmp_path / "tiles.trace")
    assert data.layout.num_frames == len(inputs.grid.media) == 2
    assert np.array_equal(data.layout.box, grid_layout(inputs.grid).box)
    data.pack()
    sheets, _ = vlm.drawing(picture(96, 96), inputs)
    assert np.array_equal(sheets[0], np.asarray(Image.fromarray(sheets[1])))


@pytest.mark.parametrize(
    "name, media",
    [
        ("qwen3_vl", [video(4), picture(), video(6, seed=1), picture(40, 64, 2), picture(48, 48, 3)]),
        ("smolvlm", [picture(96, 96)]),
        ("video_llama_3", [np.repeat(video(1), 4, 0)]),  # a still: its later frames are compressed away
        ("internvl", [video(6)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_export_of_every_grid(family_checkpoint, tmp_path, capsys, name, media):
    vlm = loaded(family_checkpoint(name))
    with FOCUS(vlm, trace=True) as run:
        vlm.prefill(vlm.prepare(media, "What moves?"))
    trace, grid = run.trace, run.last.grid
    trace.save(tmp_path / "a.trace")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path / "a.trace"), str(tmp_path / "a.pth")])
    assert ended.value.code == 0 and "a.pth" in capsys.readouterr().out
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    assert read_counts(tmp_path / "a.pth")[0].layers == run.last.counts.layers
    medium = grid.medium_of()
    assert torch.equal(Trace.load(tmp_path / "a.trace").medium, medium)
    for site in SITES:
        similar, group = stored["mask_similar"][site][:, 0], stored["group_idx"][site][:, 0].long()
        assert group.shape[1] == grid.length
        group //= group.shape[2]  # of vectors, to tokens
        _, token, _ = similar.nonzero(as_tuple=True)
        assert torch.equal(medium[group[similar]], medium[token])  # led by a token of the same medium
