"""Several methods at once: one after another at every event, counted, traced and restored as one."""

from dataclasses import replace

import pytest
import torch
from tiny_families import family, prompt
from tiny_models import clip, module_state, untrained_vlm

from focuslib.errors import UserError
from focuslib.methods import (
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
    Stack,
    Uniform,
    VidCom2,
    VisionZip,
)
from focuslib.methods.settings import make_method
from focuslib.prefill.ops import SITES
from focuslib.prefill.trace import Trace

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


DROPS = [
    FrameFusion(cost=0.5), Adaptiv(threshold=0.2), FastV(layer=2), Evs(), VidCom2(), PyramidDrop(layers=(1, 2, 4)),
    DyCoke(), VisionZip(), FlashVid(), Random(), Uniform(), FewerFrames(), FewerPixels(), Focus(
        selected_layers=(1, 3), retention=(0.6, 0.3), vector_size=16, m_tile=64),
]  # fmt: skip
IDLE = Focus(selected_layers=(), retention=(), similarity_threshold=2.0, vector_size=16, m_tile=64)  # merges nothing


def named(method):
    return method.name


def answered(vlm, method, trace=False):
    """The run, the prompt's logits, and those of three decoded tokens."""
    vlm.model.generation_config.eos_token_id = None
    with torch.inference_mode(), method(vlm, trace=trace) as run:
        inputs = vlm.prepare(clip(6), "What moves?")
        logits = vlm.prefill(inputs)
        with vlm.running(inputs):
            answer = vlm.model.generate(
                **inputs.tensors, do_sample=False, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
            )
    return run, logits, torch.cat(answer.logits)


@pytest.mark.parametrize("method", DROPS, ids=named)
def test_what_does_nothing_changes_nothing_beside_another_method(method):
    """Before it and after it, bit for bit, while decoding too; and counted as it is alone."""
    vlm = untrained_vlm()
    alone, *logits = answered(vlm, method)
    others: list = [Random(retention=1)] if method.name == "uniform" else [Uniform(retention=1)]
    others += [IDLE] if method.name != "focus" else []
    for other in others:
        for stack in (method | other, other | method):
            run, *stacked = answered(vlm, stack)
            assert all(map(torch.equal, stacked, logits))
            assert run.last.attended == alone.last.attended and run.last.retained == alone.last.retained
            assert run.sparsity == pytest.approx(alone.sparsity, abs=1e-12)
            assert (run.last.decoded, run.last.hidden) == (alone.last.decoded, alone.last.hidden)


@pytest.mark.parametrize("method", [method for method in DROPS if method.name != "focus"], ids=named)
def test_sic_alone_after_every_method(method, tmp_path):
    """Merges what is left, saves more, and is exported whole: absent tokens are zero in both files."""
    vlm = untrained_vlm()
    alone, *_ = answered(vlm, method)
    before = module_state(vlm.model)  # after a first run, in which transformers leaves hooks of its own
    sic = Focus(selected_layers=(), retention=(), vector_size=16, m_tile=64, similarity_threshold=0.3)
    run, *_ = answered(vlm, method | sic, trace=True)
    assert module_state(vlm.model) == before
    record, trace = run.last, run.trace
    assert run.sparsity > alone.sparsity
    if 0 in record.kept and len(record.kept) == 1:  # what a method drops before layer 0, SIC cannot have changed
        assert torch.equal(record.left, alone.last.left)
    trace.save(tmp_path / "a.trace")
    trace.save_pth(tmp_path / "a.pth")
    again, exported = Trace.load(tmp_path / "a.trace"), torch.load(tmp_path / "a.pth", weights_only=True)
    gone = torch.ones(record.grid.length, dtype=torch.bool)
    gone[record.left] = False
    for site in SITES:
        assert all(map(torch.equal, again.codes[site], trace.codes[site]))
        zero = trace.mask_zero(site)[7].view(record.grid.length, -1)
        assert torch.equal(zero.all(1), gone) and torch.equal(zero.any(1), gone)
        assert int(trace.mask_similar(site)[7].sum()) == record.counts.layers[7][site].similar > 0
    assert any(isinstance(value, torch.Tensor) or value for value in exported.values())


@pytest.mark.parametrize(
    ("stack", "attended"),
    [
        (VidCom2() | FastV(layer=2, retention=0.1) | SIC, [None] * 2 + [21] * 6),
        (Evs(retention=0.5) | PyramidDrop(layers=(1, 2, 4), retention=(0.4, 0.2, 0.1)) | SIC,
         [108] + [86] + [43] * 2 + [21] * 4),
        (DyCoke(order="place") | FastV(layer=2, retention=0.1) | Uniform(retention=0.3), [64] * 2 + [21] * 6),
        (Focus(selected_layers=(1, 3), retention=(0.6, 0.4), vector_size=16) | FastV(layer=5, retention=0.2),
         [216] * 2 + [129] * 2 + [86] + [43] * 3),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_three_at_once_and_focus_with_another(stack, attended):
    vlm = untrained_vlm()
    answered(vlm, Uniform())
    before = module_state(vlm.model)
    if attended[0] is None:  # VidCom2's rounding goes with the features
        alone, *_ = answered(vlm, stack.parts[0])
        attended = [kept or alone.last.attended[0] for kept in attended]
    run, *_ = answered(vlm, stack)
    assert run.last.attended == attended
    assert module_state(vlm.model) == before
    assert [ranking.by for ranking in run.last.rankings]


@pytest.mark.parametrize("last", [FastV(layer=2, target_sparsity=0.75),
                                  PyramidDrop(layers=(2, 4, 6), target_sparsity=0.7)], ids=named)  # fmt: skip
@pytest.mark.parametrize("first", [Evs(target_sparsity=0.5), FrameFusion(target_sparsity=0.5)], ids=named)
def test_a_target_counts_what_the_methods_before_have_dropped(first, last):
    run, *_ = answered(untrained_vlm(), first | last)
    assert run.sparsity == pytest.approx(last.target_sparsity, abs=0.015)
    with pytest.raises(UserError, match=f"{last.name}: target_sparsity 0.3 cannot be met .*; within reach: 0.5"):
        answered(untrained_vlm(), first | replace(last, target_sparsity=0.3))
