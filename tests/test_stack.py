"""Several methods at once: one after another at every event, counted, traced and restored as one."""

from dataclasses import replace

import pytest
import torch
from tiny_families import family, prompt
from tiny_models import clip, module_state, untrained_vlm

from focuslib.errors import UserError
from focuslib.methods import Adaptiv, Cmc, Evs, FastV, Focus, Random, Stack, VidCom2
from focuslib.methods.settings import make_method

torch.set_num_threads(1)
SIC = Focus(selected_layers=(), retention=(), similarity_threshold=0.5, vector_size=8, m_tile=64)


def run(vlm):
    return vlm.model(**prompt(), use_cache=False)[0]


@pytest.mark.parametrize("stack", [Random(retention=0.5) | SIC, FastV(layer=1) | SIC, VidCom2() | FastV(layer=2)],
                         ids=lambda stack: stack.name)  # fmt: skip
@torch.inference_mode()
def test_a_stack_is_restored_and_never_nested(stack, monkeypatch):
    vlm = family("qwen2", "sdpa")
    before, plain = module_state(vlm.model), run(vlm)
    with stack(vlm):
        assert not torch.equal(run(vlm)[:, -1], plain[:, -1])
        with pytest.raises(UserError, match="is installed on this model already"), stack(vlm):
            pass
    monkeypatch.setattr(vlm.model.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), stack(vlm):
        run(vlm)
    monkeypatch.undo()
    assert module_state(vlm.model) == before
    assert torch.equal(run(vlm), plain)


@torch.inference_mode()
def test_sic_alone_after_another_method_drops():
    """The second method sees what the first left: as Focus itself, whose drop is the same tokens at the same place."""
    vlm = untrained_vlm()
    inputs = vlm.prepare(clip(), "What moves?")
    sic = Focus(selected_layers=(), retention=(), vector_size=16, m_tile=64, similarity_threshold=0.2)
    with (Random(retention=0.4) | sic)(vlm, trace=True) as stacked:
        logits = vlm.prefill(inputs)
    with Random(retention=0.4)(vlm) as alone:
        vlm.prefill(inputs)
    record, tokens = stacked.last, stacked.last.grid.length
    assert record.attended == alone.last.attended
    assert torch.equal(record.left, alone.last.left)
    assert stacked.sparsity > alone.sparsity  # the second method saves on what the first left
    assert logits.shape[1] == alone.last.attended[-1] + inputs.tensors["inputs_embeds"].shape[1] - tokens
    for site in ("q_proj", "gate_proj"):
        zero = stacked.trace.mask_zero(site)[3].view(tokens, -1).all(1)
        assert set(range(tokens)) - set(record.left.tolist()) <= set(zero.nonzero().squeeze(1).tolist())
        assert int(stacked.trace.mask_similar(site)[3].sum()) > 0


@torch.inference_mode()
def test_each_part_has_its_own_way_with_positions():
    """VidCom2 renumbers, FastV after it does not: the decoder's positions are those of the shorter prompt."""
    vlm = family("qwen2", "sdpa")
    with VidCom2(retention=0.5)(vlm) as first:
        run(vlm)
    left = first.last.left
    rows = torch.cat([torch.arange(4), 4 + left, torch.arange(28, 40)])
    short = replace(vlm.grid, length=len(left), num_frames=1, height=1, width=len(left), frame_stride=len(left))
    ids = prompt()["input_ids"][:, rows]
    with (VidCom2(retention=0.5) | FastV(layer=2, retention=0.25))(vlm):
        logits = run(vlm)
    vlm.grid = short
    with FastV(layer=2, retention=6.5 / len(left))(vlm):
        expected = vlm.model(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_written_as_one():
    stack = make_method("random+focus", {"random.retention": "0.5", "focus.selected_layers": "", "focus.retention": ""})
    assert stack == Random(retention=0.5) | Focus(selected_layers=(), retention=())
    assert stack.name == "random+focus" and stack.emulates
    assert make_method(stack.name, stack.settings()) == stack
    assert (Random() | FastV()) | SIC == Stack((Random(), FastV(), SIC))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_method("random+focus", {"retention": 0.5}), "retention: say whose setting it is, such as random"),
        (lambda: make_method("random+focus", {"fastv.layer": 2}), "method of random"),
        (lambda: make_method("random+magic", {}), "unknown method"),
        (lambda: Random() | Random(seed=1), "methods random.random: give two or more different ones"),
    ],
)  # fmt: skip
def test_what_makes_no_stack(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (Random() | Evs(), "random.evs: evs compares all visual tokens; put it first"),
        (Random() | Adaptiv(), "random.adaptiv: adaptiv compares all visual tokens; put it first"),
        (Cmc() | Random(), "cmc.random: cmc needs all visual tokens to the end"),
    ],
)
@torch.inference_mode()
def test_orders_that_cannot_be(stack, message):
    vlm = family("qwen2", "sdpa")
    with pytest.raises(UserError, match=message), stack(vlm):
        run(vlm)
