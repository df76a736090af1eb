"""The kernels of the other methods against their official implementations' numbers, or oracles token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslib.kernels.contextual import add_means, dominant_and_contextual
from focuslib.kernels.outliers import frame_counts, frame_shares, mean_similarities, outliers
from focuslib.kernels.ranking import drawn, evenly_spaced, last_row
from focuslib.kernels.semantic import most_important
from focuslib.kernels.temporal import decoding_choice, frame_before, temporal_merge, temporal_similarity
from focuslib.kernels.trees import (
    cluster_means,
    compress_segment,
    density_peaks,
    diverse_order,
    merge_trees,
    segment_lengths,
)

EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def vectors(golden):
    def load(name):
        arrays, meta = golden(f"methods/{name}")
        return {key: torch.from_numpy(value) for key, value in arrays.items()}, meta

    return load


@pytest.mark.parametrize("case", ["video", "cut", "one_frame", "odd_channels", "all", "one_token", "newlines"])
def test_vidcom2(vectors, case):
    data, meta = vectors(f"vidcom2_{case}")
    frames, size = meta["frames"], meta.get("tokens_per_frame") or meta["side"] ** 2
    frame = torch.arange(frames).repeat_interleave(size)
    video, own = mean_similarities(data["input"], frame)
    torch.testing.assert_close(video, data["video_score"].flatten(), **EXACT)
    torch.testing.assert_close(own, data["frame_score"].flatten(), **EXACT)
    shares = frame_shares(video, frame, meta["retention"])
    torch.testing.assert_close(shares, data["shares"], **EXACT)
    sizes = [size] * frames
    kept = outliers(video + own, sizes, frame_counts(shares, sizes))
    if "side" in meta:  # rows of `side` tokens and a newline; the newlines stand after a frame's tokens there
        side = meta["side"]
        row, column = kept // side, kept % side
        newlines = torch.arange(frames * side) * (side + 1) + side
        assert sorted([*(row * (side + 1) + column).tolist(), *newlines.tolist()]) == sorted(data["kept"].tolist())
    else:
        assert kept.tolist() == data["kept"].tolist()


@pytest.mark.parametrize("case", ["first", "second", "few", "odd"])
def test_pyramiddrop(vectors, case):
    data, meta = vectors(f"pyramiddrop_{case}")
    score = last_row(data["queries"], data["keys"], meta["scaling"])
    start, stop = meta["start"], meta["start"] + meta["visual"]
    visual = start + most_important(score[start:stop], int(meta["original"] * meta["ratio"]))
    rows = [*range(start), *visual.tolist(), *range(stop, len(score))]
    assert rows == data["kept"].tolist()
    assert data["positions"].tolist() == list(range(len(rows)))  # fresh ones


@pytest.mark.parametrize("case", ["frames16", "frames9", "frames5", "frames6", "frames7", "whole"])
def test_dycoke_prefill(vectors, case):
    data, meta = vectors(f"dycoke_{case}")
    size = meta["tokens_per_frame"]
    frames = data["input"].view(meta["frames"], size, -1)
    kept = temporal_merge(frames, int((1 - meta["k"]) * size))
    kept = torch.cat([frame * size + places for frame, places in enumerate(kept)])
    assert kept.tolist() == data["kept"].tolist()


@pytest.mark.parametrize("case", ["steps", "keep_none"])
def test_dycoke_decoding(vectors, case):
    data, meta = vectors(f"dycoke_decoding_{case}")
    start, visual, last = meta["start"], meta["visual"], None
    for step in range(meta["steps"]):
        attention = data[f"attention_{step}"].mean(0)[-1]
        entries = list(range(len(attention)))
        row = attention[start : start + visual]
        chosen = decoding_choice(row, last, int(visual * (1 - meta["p"])))
        if chosen is not None:
            stay = set((chosen + start).tolist())
            entries = [entry for entry in entries if not start <= entry < start + visual or entry in stay]
        assert entries == data[f"entries_{step}"].tolist()
        last = row


@pytest.mark.parametrize("case", ["frames", "image", "uneven", "one_target", "few_left"])
def test_visionzip(vectors, case):
    data, meta = vectors(f"visionzip_{case}")
    for picture in range(len(data["hidden"])):
        score, keys = data["attention"][picture].sum(0), data["keys"][picture].mean(0)
        kept, joins = dominant_and_contextual(score, keys, meta["dominant"], meta["contextual"])
        assert kept[: meta["dominant"]].tolist() == data["kept"][picture].tolist()
        out = torch.cat([data["cls"][picture], add_means(data["hidden"][picture], joins)[kept]])
        torch.testing.assert_close(out, data["output"][picture], **EXACT)


def test_flashvid_segments(vectors):
    data, meta = vectors("flashvid_segments")
    for case, wanted in enumerate(meta["cases"]):
        lengths = segment_lengths(data[f"input_{case}"], wanted["threshold"], wanted["least"])
        # the official code cuts twice at one place where more segments than frames are asked for
        assert lengths == [length for length in data[f"lengths_{case}"].tolist() if length]


def test_flashvid_diverse_tokens(vectors):
    data, meta = vectors("flashvid_diversity")
    for case, wanted in enumerate(meta["cases"]):
        chosen = diverse_order(data[f"input_{case}"], data[f"attention_{case}"], wanted["keep"])
        assert chosen.sort(1).values.tolist() == data[f"kept_{case}"].tolist()


def test_flashvid_trees(vectors):
    data, meta = vectors("flashvid_trees")
    for case, wanted in enumerate(meta["cases"]):
        frames, free = data[f"input_{case}"], data[f"mask_{case}"]
        before = frames.clone()
        means, left = merge_trees(frames, free, wanted["threshold"], wanted["quota"])
        assert torch.equal(frames, before)
        assert left.flatten().nonzero().squeeze(1).tolist() == data[f"kept_{case}"].tolist()
        torch.testing.assert_close(means[left], data[f"output_{case}"], **EXACT)


def test_flashvid_clusters(vectors):
    data, meta = vectors("flashvid_clusters")
    for case, wanted in enumerate(meta["cases"]):
        x = data[f"input_{case}"]
        label, centers = density_peaks(x, wanted["clusters"], wanted["neighbours"])
        assert centers.tolist() == data[f"centers_{case}"].tolist()
        assert label.tolist() == data[f"labels_{case}"].tolist()
        means = cluster_means(x, label, wanted["clusters"])
        for number, mean in enumerate(means):
            torch.testing.assert_close(mean, x[label == number].mean(0), **EXACT)


@pytest.mark.parametrize("case", ["video", "published", "still", "moving", "diverse_only", "merged_only"])
def test_flashvid_whole(vectors, case):
    data, meta = vectors(f"flashvid_{case}")
    frames, size = data["input"].shape[:2]
    budget = math.ceil(size * meta["retention"] * meta["expansion"])
    diverse = math.ceil(budget * meta["alpha"])
    first, tokens, numbers = 0, [], []
    for length in segment_lengths(data["input"].mean(1), meta["segment_threshold"], meta["least_segments"]):
        part = slice(first, first + length)
        kept, number = compress_segment(
            data["input"][part], data["attention"][part], diverse, budget - diverse, meta["temporal_threshold"]
        )
        tokens.append(kept)
        numbers.append(number + first * size)
        first += length
    assert first == frames
    assert torch.cat(numbers).tolist() == data["kept"].tolist()
    torch.testing.assert_close(torch.cat(tokens), data["output"], **EXACT)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 6), size=st.integers(1, 7))
def test_evs_equals_oracle(seed, frames, size):
    """Written token by token: cosine with the token of the same place in the frame before; none for frame 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(frames * size, 5, generator=generator)
    before = frame_before(torch.arange(frames * size) % size)
    similarity = temporal_similarity(x, before)
    for number in range(frames * size):
        if number < size:
            assert before[number] == number and similarity[number] == -math.inf
        else:
            assert before[number] == number - size
            a, b = x[number].double().numpy(), x[number - size].double().numpy()
            cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
            assert float(similarity[number]) == pytest.approx(cosine, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 12), padding=st.integers(0, 3), kv_heads=st.integers(1, 3))
def test_last_row_equals_oracle(seed, tokens, padding, kv_heads):
    """FastV's score, written head by head in float64: the last token's softmax, mean over heads."""
    generator = torch.Generator().manual_seed(seed)
    heads, total = 2 * kv_heads, tokens + padding
    q, k = torch.randn(heads, total, 4, generator=generator), torch.randn(kv_heads, total, 4, generator=generator)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[tokens:], mask[:, tokens:] = False, False
    expected = np.zeros(tokens)
    for head in range(heads):
        logits = np.array(
            [0.5 * float(q[head, tokens - 1].double() @ k[head // 2, key].double()) for key in range(tokens)]
        )
        weights = np.exp(logits - logits.max())
        expected += weights / weights.sum() / heads
    score = last_row(q, k, 0.5, mask[None] if padding else None)
    np.testing.assert_allclose(score[:tokens].numpy(), expected, rtol=0, atol=1e-5)
    assert (score[tokens:] == 0).all()


@given(total=st.integers(1, 300), keep=st.integers(0, 300), seed=st.integers(0, 2**31))
def test_even_and_random_choices(total, keep, seed):
    keep = min(total, keep)
    for chosen in (evenly_spaced(total, keep).tolist(), drawn(total, keep, seed).tolist()):
        assert len(set(chosen)) == keep and chosen == sorted(chosen)
        assert all(0 <= number < total for number in chosen)
    gaps = np.diff(evenly_spaced(total, keep).numpy())
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert drawn(total, keep, seed).equal(drawn(total, keep, seed))
