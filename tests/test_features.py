"""The store of clips and features: what it gives is what is computed, bit for bit, and it keeps within its bound."""

import os
import shutil

import numpy as np
import pytest
import torch
from tiny_models import untrained_vlm

from focuslib.evaluation.lmms import question
from focuslib.methods import FewerFrames, FewerPixels, VisionZip
from focuslib.models.base import VLM
from focuslib.models.features import SHARE, FeatureStore


@pytest.fixture(scope="module")
def vlm():
    return untrained_vlm()


@pytest.fixture
def encoded(vlm, monkeypatch):
    """Counts the clips that the tower encodes; the model has a new store."""
    count, original = [], type(vlm).encode_video

    def counting(self, pixels):
        count.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(type(vlm), "encode_video", counting)
    monkeypatch.setattr(vlm, "store", FeatureStore())
    return count


def logits(vlm: VLM, media, prompt: str, method=None) -> torch.Tensor:
    if method is None:
        return vlm.prefill(vlm.prepare(media, prompt))
    with method(vlm):
        return vlm.prefill(vlm.prepare(media, prompt))


def test_logits_are_bit_identical(vlm, encoded, monkeypatch):
    (media, prompt), (other, _) = (question("tinyvideo_motion", vlm.name, number) for number in (0, 3))
    methods = (None, FewerFrames(), FewerPixels(), None)
    for clip in (media, other):
        with_store = [logits(vlm, clip, prompt, method) for method in methods]
        with monkeypatch.context() as patch:
            patch.setattr(vlm, "store", None)
            without = [logits(vlm, clip, prompt, method) for method in methods]
        assert all(torch.equal(*pair) for pair in zip(with_store, without, strict=True))
    assert len(encoded) == 2 * (1 + 4)


def test_what_a_watched_tower_showed_is_shown_again(vlm, encoded, monkeypatch):
    """Bit for bit what the tower shows when it runs, for each prompt alone, at each layer that is watched."""
    asked = [question("tinyvideo_motion", vlm.name, number) for number in (0, 3, 0)]
    methods = [VisionZip(), VisionZip(tower_layer=-1)]

    def all_logits():
        found = []
        for method in methods:
            with method(vlm):
                found += [vlm.prefill(vlm.prepare(media, prompt)) for media, prompt in asked]
        return found

    first = all_logits()
    assert len(encoded) == 2 * 2  # two clips, at each layer
    again = all_logits()
    assert len(encoded) == 4
    monkeypatch.setattr(vlm, "store", None)
    for found in (first, again):
        assert all(torch.equal(*pair) for pair in zip(found, all_logits(), strict=True))
    assert not torch.equal(first[0], first[3])


def test_features_of_a_tower_that_nothing_watched_do_not_serve_a_method_that_does(vlm, encoded):
    media, prompt = question("tinyvideo_motion", vlm.name, 0)
    logits(vlm, media, prompt)
    first = logits(vlm, media, prompt, VisionZip())
    assert torch.equal(logits(vlm, media, prompt, VisionZip()), first) and len(encoded) == 2


def test_frames_that_differ_have_features_of_their_own(vlm, encoded):
    frames = vlm.frames(question("tinyvideo_motion", vlm.name, 0)[0])
    changed = frames.copy()
    changed[0, 0, 0, 0] ^= 1
    for clip in (frames, changed, frames[:4], frames.reshape(4, -1, *frames.shape[2:])):
        vlm.video_features(clip)
    assert len(encoded) == 4
    vlm.video_features(frames[::-1][::-1])
    assert len(encoded) == 4 and vlm.store.hits == 1


def test_a_file_that_changes_is_read_again(vlm, encoded, tmp_path):
    path, source = tmp_path / "clip.mp4", [question("tinyvideo_motion", vlm.name, number)[0] for number in (0, 3)]
    shutil.copyfile(source[0], path)
    first = vlm.frames(path)
    assert vlm.frames(path) is first
    shutil.copyfile(source[1], path)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(vlm.frames(path), vlm.frames(source[1]))


def test_the_bound_holds():
    size = 4 * 1024
    store, made = FeatureStore(limit=size * SHARE), []

    def encode(frames):
        made.append(int(frames.flat[0]))
        return torch.zeros(1024)  # 4 KiB

    for number in range(SHARE + 10):
        store.features(np.full((1, 2, 2, 3), number, np.uint8), encode)
        assert store.used <= store.limit
    assert len(made) == SHARE + 10 and store.hits == 0
    store.features(np.full((1, 2, 2, 3), SHARE + 9, np.uint8), encode)  # still there
    store.features(np.full((1, 2, 2, 3), 0, np.uint8), encode)  # the first to leave
    assert store.hits == 1 and made[-1] == 0
    large = np.zeros((1, 64, 64, 3), np.uint8)
    for _ in range(2):
        store.features(large, encode)
    assert len(made) == SHARE + 13 and store.used <= store.limit
