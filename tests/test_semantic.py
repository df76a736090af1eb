"""SEC against vectors of the published implementation and plain softmax attention."""

import pytest
import torch

from focuslib.kernels.semantic import (
    attention_rows,
    causal_attention,
    most_important,
    prompt_importance,
    tokens_to_keep,
)


def test_two_prunings_equal_published_vectors(golden):
    data, meta = golden("sec_two_steps")
    start, total = meta["image_start"], meta["image_len"]
    sequence = torch.arange(start + total + meta["text_after"])
    for step, alpha in enumerate(meta["alpha"]):
        rows = torch.from_numpy(data[f"attn{step}"])
        visual = (sequence >= start) & (sequence < start + total)
        text = sequence >= start + total
        importance = rows[:, text][:, :, visual].amax((0, 1))
        torch.testing.assert_close(importance, torch.from_numpy(data[f"importance{step}"]), rtol=0, atol=1e-6)
        kept = most_important(importance, tokens_to_keep(total, alpha, int(visual.sum())))
        sequence = torch.cat([sequence[:start], sequence[visual][kept], sequence[text]])
        assert torch.equal(sequence, torch.from_numpy(data[f"retained{step}"]))


def test_importance_is_the_maximum_of_full_attention():
    torch.manual_seed(0)
    heads, kv_heads, tokens, width, start, count = 6, 2, 30, 8, 3, 20
    q, k = torch.randn(heads, tokens, width), torch.randn(kv_heads, tokens, width)
    keys = k.repeat_interleave(heads // kv_heads, 0)
    scores = (q.double() @ keys.double().transpose(1, 2)) * 0.3
    full = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf")).softmax(-1)
    expected = full[:, start + count :, start : start + count].amax((0, 1)).float()
    torch.testing.assert_close(prompt_importance(q, k, start, count, 0.3), expected)
    rows = torch.tensor([0, 7, 29])
    torch.testing.assert_close(attention_rows(q[:, rows], k, rows, 0.3), full[:, rows].float())


def test_no_text_after_the_video_is_refused():
    q = torch.randn(2, 10, 4)
    with pytest.raises(ValueError, match="no text follows"):
        prompt_importance(q, q, 2, 8, 1.0)


def test_equal_importance_keeps_the_first():
    assert most_important(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("total", "alpha", "left", "keep"), [(980, 0.6, 980, 588), (10, 0.01, 10, 1), (100, 0.5, 30, 30)]
)
def test_tokens_to_keep(total, alpha, left, keep):
    assert tokens_to_keep(total, alpha, left) == keep


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 400, 1100])
def test_causal_attention_equals_attention_rows(tokens):
    """The full matrix, taken some rows at a time; into memory that held another before."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, tokens, 16, generator=generator), torch.randn(2, tokens, 16, generator=generator)
    out = torch.full((4, tokens, tokens), 7.0)
    found = causal_attention(queries, keys, 0.25, out)
    expected = attention_rows(queries, keys, torch.arange(tokens), 0.25)
    assert found is out and torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert not found.triu(1).any()
    weight, gradients = torch.rand(expected.shape, generator=generator), []
    for full in (causal_attention, lambda q, k, scaling: attention_rows(q, k, torch.arange(tokens), scaling)):
        q = queries.clone().requires_grad_()
        (full(q, keys, 0.25) * weight).sum().backward()
        gradients.append(q.grad)
    assert torch.allclose(*gradients, rtol=0, atol=1e-5)
