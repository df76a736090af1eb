"""The patch: changes nothing by itself, restores the model exactly, and drops tokens for good."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from tiny_models import clip, module_state, untrained_vlm
from torch import nn

from focuslib.grid import VisualGrid
from focuslib.methods import Adaptiv, Cmc, Dense, Focus, FrameFusion
from focuslib.prefill.decoder import find_decoder

SMALL = {"selected_layers": (1, 3, 5), "retention": (0.6, 0.4, 0.2), "vector_size": 16, "m_tile": 64}
ACTING = (
    Focus(**SMALL), Adaptiv(threshold=0.2), FrameFusion(cost=0.5), Cmc(linear_threshold=1.0, skip_score_layers=()),
)  # fmt: skip


@pytest.fixture(params=["sdpa", "eager"])
def vlm(request):
    return untrained_vlm(request.param)


def test_a_method_that_changes_nothing_changes_no_bit(vlm):
    inputs = vlm.prepare(clip(), "What moves?")
    plain, ids = vlm.prefill(inputs), vlm.generate_ids(inputs)
    with Dense()(vlm) as run:
        assert torch.equal(vlm.prefill(inputs), plain)
        assert torch.equal(vlm.generate_ids(inputs), ids)
    assert run.sparsity == 0
    assert run.last.retained == [inputs.grid.length] * 8
    never_similar = Focus(selected_layers=(), retention=(), similarity_threshold=1.5)
    with never_similar(vlm) as run:
        assert torch.equal(vlm.prefill(inputs), plain)
    assert run.sparsity == 0


@pytest.mark.parametrize("method", ACTING, ids=lambda method: method.name)
def test_the_model_is_restored(vlm, method):
    inputs = vlm.prepare(clip(8), "What moves?")
    before, plain = module_state(vlm.model), vlm.prefill(inputs)
    with method(vlm):
        assert not torch.equal(vlm.prefill(inputs)[:, -1], plain[:, -1])
    assert module_state(vlm.model) == before
    assert torch.equal(vlm.prefill(inputs), plain)


@pytest.mark.parametrize("method", ACTING, ids=lambda method: method.name)
def test_the_model_is_restored_when_a_run_breaks_off(vlm, method, monkeypatch):
    inputs = vlm.prepare(clip(8), "What moves?")
    before, plain = module_state(vlm.model), vlm.prefill(inputs)
    monkeypatch.setattr(vlm.model.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), method(vlm):
        vlm.prefill(inputs)
    monkeypatch.undo()
    assert module_state(vlm.model) == before
    assert torch.equal(vlm.prefill(inputs), plain)


def test_two_models_are_patched_at_the_same_time():
    one, other = untrained_vlm("eager"), untrained_vlm("sdpa")
    inputs = one.prepare(clip(), "What moves?")
    with Dense()(one):
        plain = one.prefill(inputs)
        with Dense()(other):
            other.prefill(other.prepare(clip(), "What moves?"))
            assert torch.equal(one.prefill(inputs), plain)
        assert torch.equal(one.prefill(inputs), plain)


def test_the_model_is_restored_after_an_exception(vlm):
    inputs = vlm.prepare(clip(), "What moves?")
    before, plain = module_state(vlm.model), vlm.prefill(inputs)

    @dataclass(frozen=True)
    class Broken(Dense):
        def at_site(self, prefill, layer, site, x):
            if layer == 3:
                raise ZeroDivisionError
            return x

    with pytest.raises(ZeroDivisionError), Broken()(vlm):
        vlm.prefill(inputs)
    assert module_state(vlm.model) == before
    assert torch.equal(vlm.prefill(inputs), plain)


@dataclass(frozen=True)
class Replay(Focus):
    """Focus that keeps given tokens instead of choosing them."""

    kept: dict = field(default_factory=dict)

    def after_attention(self, prefill, layer, hidden):
        if layer not in self.kept:
            return hidden, None
        rows = torch.arange(len(hidden))
        still = torch.isin(prefill.present, self.kept[layer]).nonzero().squeeze(1) + prefill.visual.start
        return hidden, torch.cat([rows[: prefill.visual.start], still, rows[prefill.visual.stop :]])


@pytest.mark.parametrize("sec_only", [False, True])
@torch.inference_mode()
def test_cached_decoding_equals_recomputation(vlm, sec_only):
    inputs = vlm.prepare(clip(), "What moves?")
    prompt = inputs.tensors["inputs_embeds"]
    vlm.model.generation_config.eos_token_id = None  # always sixteen tokens
    with Focus(**SMALL, sec_only=sec_only)(vlm) as run, vlm.running(inputs):
        cached = vlm.model.generate(
            **inputs.tensors, do_sample=False, max_new_tokens=16, output_logits=True, return_dict_in_generate=True
        )
    ids = cached.sequences[0]
    assert len(ids) == 16
    assert [len(run.last.kept[layer]) for layer in (1, 3, 5)] == [86, 57, 28]
    replay = Replay(**SMALL, sec_only=sec_only, kept=run.last.kept)
    for step in range(16):
        embeds = torch.cat([prompt, vlm.model.get_input_embeddings()(ids[:step])[None]], 1)
        with replay(vlm), vlm.running(inputs):
            logits = vlm.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, cached.logits[step][0], rtol=0, atol=1e-4)
        assert logits.argmax() == ids[step]


@torch.inference_mode()
def test_cached_decoding_equals_recomputation_after_a_merge_before_the_first_layer(vlm):
    inputs = vlm.prepare(clip(), "What moves?")
    prompt, method = inputs.tensors["inputs_embeds"], Adaptiv(threshold=0.2)
    vlm.model.generation_config.eos_token_id = None
    with method(vlm) as run, vlm.running(inputs):
        cached = vlm.model.generate(
            **inputs.tensors, do_sample=False, max_new_tokens=16, output_logits=True, return_dict_in_generate=True
        )
    assert 0 < run.last.stats["sparsity"] < 1
    ids = cached.sequences[0]
    for step in range(16):  # which tokens are merged does not depend on the text
        embeds = torch.cat([prompt, vlm.model.get_input_embeddings()(ids[:step])[None]], 1)
        positions = torch.arange(embeds.shape[1])[None]
        with method(vlm), vlm.running(inputs):
            logits = vlm.model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, cached.logits[step][0], rtol=0, atol=1e-4)
        assert logits.argmax() == ids[step]


def test_traces_and_records_agree(vlm):
    inputs = vlm.prepare(clip(), "What moves?")
    with Focus(**SMALL)(vlm, trace=True) as run:
        vlm.prefill(inputs)
    trace = run.trace
    for layer in range(8):
        for site, counts in run.last.counts.layers[layer].items():
            assert int(trace.mask_zero(site)[layer].sum()) == counts.zero
            assert int(trace.mask_similar(site)[layer].sum()) == counts.similar
    assert run.last.retained == [144, 86, 86, 57, 57, 28, 28, 28]
    assert 0 < run.sparsity < 1


@pytest.mark.parametrize("method", ACTING, ids=lambda method: method.name)
def test_nesting_is_refused(vlm, method):
    with (
        method(vlm),
        pytest.raises(ValueError, match=f"{method.name} is installed on this model already"),
        Dense()(vlm),
    ):
        pass
    with Dense()(vlm):
        pass


def test_batches_are_refused(vlm):
    inputs = vlm.prepare(clip(), "What moves?")
    two = inputs.tensors["inputs_embeds"].repeat(2, 1, 1)
    with Focus(**SMALL)(vlm), vlm.running(inputs), pytest.raises(ValueError, match="batch size is 2"):
        vlm.model(inputs_embeds=two)


def test_a_prompt_without_visual_tokens_is_refused(vlm):
    with Focus(**SMALL)(vlm), pytest.raises(ValueError, match="no visual tokens"):
        vlm.generate(None, "What is the answer?")


def test_a_layer_that_does_not_exist_is_refused(vlm):
    with Focus()(vlm), pytest.raises(ValueError, match="selected layer 25 does not exist; the model has 8"):
        vlm.generate(clip(), "What moves?")


def test_a_model_without_a_decoder_is_refused():
    model = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)), grid=VisualGrid(0, 1, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="Sequential has no decoder"), Focus()(model):
        pass
    with pytest.raises(ValueError, match="Sequential has no decoder"):
        find_decoder(model.model)


def test_what_was_not_recorded_is_said_clearly(vlm):
    with Focus(**SMALL)(vlm) as run:
        with pytest.raises(ValueError, match="nothing was run"):
            _ = run.sparsity
        vlm.generate(clip(), "What moves?")
    with pytest.raises(ValueError, match="trace=True"):
        _ = run.trace
