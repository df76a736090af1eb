"""What the explorer says a method ranks by: the scores that decided, for every method, through file and page."""

import numpy as np
import pytest
import torch
from test_explore import unpack
from tiny_models import clip, untrained_vlm

from focuslib.explore.recorder import NEVER
from focuslib.explore.view import ViewData, rank_shares, run_view
from focuslib.methods import (
    METHODS,
    Adaptiv,
    Cmc,
    DyCoke,
    Evs,
    FastV,
    FewerFrames,
    FewerPixels,
    FlashVid,
    Focus,
    FrameFusion,
    PyramidDrop,
    Random,
    Uniform,
    VidCom2,
    VisionZip,
)

PROBE = Focus(selected_layers=(), retention=(), vector_size=16, m_tile=128)
TOP = [  # the highest scores stay, exactly
    Focus(selected_layers=(2, 4), retention=(0.4, 0.2), vector_size=16), FastV(layer=2), Evs(retention=0.4),
    PyramidDrop(layers=(1, 2, 4)), Random(), FrameFusion(cost=0.5),
]  # fmt: skip
OTHERS = [VidCom2(), DyCoke(), VisionZip(), FlashVid(), Evs(retention=0.6) | FastV(layer=2, retention=0.3)]
UNRANKED = [Adaptiv(), Cmc(linear_threshold=1.0, skip_score_layers=()), Uniform(), FewerFrames(), FewerPixels()]


@pytest.fixture(scope="module")
def vlm():
    torch.set_num_threads(1)
    return untrained_vlm()


def view_of(vlm, method):
    return run_view(vlm, clip(6), "What moves?", method, PROBE, dense_answer="", max_new_tokens=2)


def test_every_method_is_one_or_the_other():
    named = {part.name for method in TOP + OTHERS + UNRANKED for part in getattr(method, "parts", (method,))}
    assert named == set(METHODS) - {"dense"}


@pytest.mark.parametrize("method", TOP + OTHERS, ids=lambda method: method.name)
def test_what_a_method_ranks_by_is_shown(vlm, method, tmp_path):
    data = view_of(vlm, method)
    recording, dropped = data.recording, data.recording.dropped
    stages = [ranking.stage for ranking in recording.rankings]
    assert stages == sorted(stages) and stages
    gone = set()
    for number, ranking in enumerate(recording.rankings):
        scores = ranking.scores.numpy()
        assert ranking.by != "score" and not np.isnan(scores).any()
        until = [*stages, 99][number + 1]
        falls = (dropped != NEVER) & (dropped < until) & ~np.isin(np.arange(len(scores)), list(gone))
        assert set(np.flatnonzero(np.isneginf(scores))) == gone  # those that had gone before were not ranked
        stays = ~np.isneginf(scores) & ~falls
        assert falls.any() and stays.any()
        if method in TOP:
            assert scores[stays].min() >= scores[falls].max()
        gone |= set(np.flatnonzero(falls))
    data.save(tmp_path / "view.npz")
    again = ViewData.load(tmp_path / "view.npz")
    header, array = unpack(again.pack())
    for ranking, loaded, packed in zip(recording.rankings, again.recording.rankings, header["rankings"], strict=True):
        assert (ranking.stage, ranking.by) == (loaded.stage, loaded.by) == (packed["stage"], packed["by"])
        assert torch.equal(ranking.scores, loaded.scores)
        assert np.array_equal(array(packed["scores"]), ranking.scores.numpy())
        assert np.array_equal(array(packed["place"]), rank_shares(ranking.scores.numpy()))


@pytest.mark.parametrize("method", UNRANKED, ids=lambda method: method.name)
def test_a_method_that_ranks_nothing_shows_no_ranking(vlm, method):
    assert unpack(view_of(vlm, method).pack())[0]["rankings"] == []


def test_shares_are_counts():
    scores = np.array([3.0, -np.inf, 1.0, np.inf, 3.0], np.float32)
    for score, share in zip(scores, rank_shares(scores), strict=True):
        below = sum(other <= score for other in scores if other > -np.inf)
        assert share == (0 if score == -np.inf else np.ceil(65535 * below / 4))
