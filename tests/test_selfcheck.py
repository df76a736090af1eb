"""Families of decoders: computed exactly under the patch, or refused in one line; none accepted and wrong."""

import copy
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from shrunk_families import tried
from tiny_families import (
    GRID,
    MARKERS,
    TOKENS,
    Asks,
    decoding_error,
    family,
    gemma4,
    longer,
    paligemma,
    pi0,
    prompt,
    qwen3_vl,
    text_model,
    vlm,
)
from tiny_models import clip, module_state, untrained_vlm
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION

from focuslib.errors import UserError
from focuslib.methods import Adaptiv, Cmc, Dense, FastV, FewerPixels, Focus, FrameFusion, Random
from focuslib.prefill.decoder import find_decoder

torch.set_num_threads(1)
WINDOW = {"sliding_window": 12}
MIXED = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXACT = [
    ("qwen2", {}), ("qwen3", {}), ("llama", {}), ("mistral", {}), ("ministral3", {}), ("olmo", {}), ("smollm3", {}),
    ("helium", {}), ("seed_oss", {}), ("ernie4_5", {}), ("diffllama", {}), ("gemma", {}), ("stablelm", {}),
    ("hunyuan_v1_dense", {}), ("bitnet", {}), ("cwm", {}), ("granite", {"attention_multiplier": 0.3}),
    ("mistral", WINDOW), ("ministral", WINDOW), ("smollm3", WINDOW | MIXED),
    ("qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    ("mistral", {"sliding_window": TOKENS + 5}),  # outgrown while decoding
]  # fmt: skip
NORM = "its forward is not the pre-norm one this patch reproduces"
REFUSED = [
    ("gemma2", "eager", {}, f"Gemma2ForCausalLM: Gemma2DecoderLayer: {NORM} .* it also has pre_feedforward_layernorm"),
    ("gemma3_text", "sdpa", {}, f"Gemma3DecoderLayer: {NORM}"),
    ("granite", "sdpa", {"residual_multiplier": 0.22}, f"GraniteDecoderLayer: {NORM} .* residual_multiplier = 0.22"),
    ("hyperclovax", "sdpa", {}, f"HyperCLOVAXDecoderLayer: {NORM} .* post_norm1"),
    ("doge", "sdpa", {}, f"DogeDecoderLayer: {NORM} .* input_residual"),
    ("gemma4_text", "sdpa", {"vocab_size_per_layer_input": 96}, "Gemma4TextDecoderLayers do not share one shape"),
    ("stablelm", "sdpa", {"use_parallel_residual": True}, "StableLmDecoderLayer has no post_attention_layernorm"),
    ("cohere", "sdpa", {}, "CohereDecoderLayer has no post_attention_layernorm"),
    ("olmo2", "sdpa", {}, "Olmo2DecoderLayer has no input_layernorm"),
    ("phi3", "sdpa", {}, r"Phi3DecoderLayer has no self_attn.q_proj.*Phi3Attention has o_proj, qkv_proj"),
    ("glm", "sdpa", {}, r"GlmDecoderLayer has no mlp.gate_proj, mlp.up_proj \(GlmMLP has gate_up_proj"),
    ("qwen3_moe", "sdpa", {}, r"Qwen3MoeDecoderLayer has no mlp.gate_proj.*\(Qwen3MoeSparseMoeBlock has experts"),
]


def run(vlm, inputs=None):
    return vlm.model(**(inputs or prompt()), use_cache=False)[0]


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "settings"), EXACT, ids=lambda value: "+".join(value) or "plain"
                         if isinstance(value, dict) else value)  # fmt: skip
@torch.inference_mode()
def test_families_of_the_pre_norm_shape_are_exact(name, settings, attention):
    vlm = family(name, attention, **settings)
    before, plain = module_state(vlm.model), run(vlm)
    with Dense()(vlm):
        assert torch.equal(run(vlm), plain)
    with Asks()(vlm):
        torch.testing.assert_close(run(vlm), plain, rtol=0, atol=1e-5)
    assert decoding_error(vlm, prompt(), (0, 1), (0.6, 0.3)) < 2e-5
    assert module_state(vlm.model) == before
    assert torch.equal(run(vlm), plain)


@pytest.mark.parametrize(("name", "attention", "settings", "reason"), REFUSED, ids=lambda value: str(value)[:12])
def test_other_families_are_refused(name, attention, settings, reason):
    vlm = family(name, attention, **settings)
    plain = run(vlm)
    with pytest.raises(UserError, match=reason) as error, Dense()(vlm):
        with suppress(UserError):
            run(vlm)
        run(vlm)  # and it stays refused
    one_line(error)
    assert torch.equal(run(vlm), plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_flag_that_moves_the_norms_is_found(attention):
    settings = {"additional_vocab_size": 4, "rope_scaling_layers": []}
    right = text_model("molmo2_text", attention, **settings, norm_after=False)
    plain = run(right)
    with Dense()(right):
        assert torch.equal(run(right), plain)
    wrong = text_model("molmo2_text", attention, **settings, norm_after=True)
    with pytest.raises(UserError, match=f"Molmo2TextModel: Molmo2DecoderLayer: {NORM}"), Dense()(wrong):
        run(wrong)


def test_a_single_layer_of_another_kind_is_found():
    vlm = family("llama", "sdpa")
    layer = vlm.model.model.layers[2]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.001
    with pytest.raises(UserError, match=f"LlamaDecoderLayer: {NORM}"), Dense()(vlm):
        run(vlm)


def test_an_attention_out_of_reach_is_refused():
    vlm = family("llama", "sdpa")

    class Own(type(vlm.model.model.layers[0].self_attn)):
        def forward(self, hidden_states, **kwargs):
            return self.o_proj(hidden_states), None

    for layer in vlm.model.model.layers:
        layer.self_attn.__class__ = Own
    with (
        pytest.raises(UserError, match="LlamaDecoderLayer: its Own does not call one of transformers' attention"),
        Dense()(vlm),
    ):
        run(vlm)


@torch.inference_mode()
def test_the_check_leaves_no_trace():
    vlm = family("qwen2", "eager")
    expected = vlm.model(**prompt(), use_cache=True, output_attentions=True, output_hidden_states=True)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with Dense()(vlm):
        got = vlm.model(**prompt(), use_cache=True, output_attentions=True, output_hidden_states=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.past_key_values.get_seq_length() == TOKENS
    assert [len(got.attentions), len(got.hidden_states)] == [3, 4]
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_padding_is_neither_seen_nor_asked(attention):
    vlm, inputs = family("qwen2", attention), prompt()
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (7, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (7, 0)),
    }
    focus = Focus(selected_layers=(0, 1), retention=(0.6, 0.3), vector_size=8, m_tile=64)
    with focus(vlm) as whole:
        plain = run(vlm, inputs)
    vlm.grid = replace(GRID, start=GRID.start + 7)
    with focus(vlm) as shifted:
        got = run(vlm, padded)
    torch.testing.assert_close(got[0, -8:], plain[0, -8:], rtol=0, atol=2e-5)
    for layer in (0, 1):
        assert torch.equal(shifted.last.kept[layer], whole.last.kept[layer])
    with Asks()(vlm):
        asked = run(vlm, padded)
    torch.testing.assert_close(asked[0, 7:], run(vlm, padded)[0, 7:], rtol=0, atol=1e-5)
    assert decoding_error(vlm, padded, (0, 1), (0.6, 0.3)) < 2e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_a_prefix_that_attends_both_ways(attention):
    vlm, inputs = paligemma(attention)
    plain = run(vlm, inputs)
    with Dense()(vlm):
        assert torch.equal(run(vlm, inputs), plain)
    with Asks()(vlm):
        torch.testing.assert_close(run(vlm, inputs), plain, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_rows_of_more_than_a_softmax_are_refused_where_they_are_asked_for():
    focus = Focus(selected_layers=(1,), retention=(0.3,), vector_size=8, m_tile=64)
    sinks = family("granite_swa", "eager", **WINDOW)
    plain = run(sinks)
    with Dense()(sinks):
        assert torch.equal(run(sinks), plain)
    for method in (focus, Asks()):
        with pytest.raises(UserError, match="GraniteSWAAttention attends with attention sinks") as error, method(sinks):
            run(sinks)
        one_line(error)
    capped = family("llama", "sdpa")
    for layer in capped.model.model.layers:
        layer.self_attn.attn_logit_softcapping = 20.0
    with pytest.raises(UserError, match="LlamaAttention attends with a soft cap"), focus(capped):
        run(capped)
    both_ways = family("gemma", "sdpa", use_bidirectional_attention=True)
    plain = run(both_ways)
    with Dense()(both_ways):
        assert torch.equal(run(both_ways), plain)
    with Asks()(both_ways):
        torch.testing.assert_close(run(both_ways), plain, rtol=0, atol=1e-5)
    sunk = family("llama", "sdpa")  # an attention function that does more than it says
    ATTENTION["doubled"] = lambda module, q, *rest, **kwargs: ATTENTION["sdpa"](module, q * q.abs(), *rest, **kwargs)
    sunk.model.config._attn_implementation_internal = "doubled"
    with pytest.raises(UserError, match="LlamaAttention: its attention is not the softmax"), focus(sunk):
        run(sunk)


def test_the_decoder_is_no_tower_and_no_action_expert():
    model = pi0()
    assert find_decoder(model) is model.model.vlm.language_model
    model = gemma4()
    assert find_decoder(model) is model.model.language_model


@pytest.mark.parametrize("method", [Dense(), Focus(selected_layers=(1,), retention=(0.3,))])
def test_a_static_cache_is_refused(method):
    vlm = family("llama", "sdpa")
    with pytest.raises(UserError, match="a static cache keeps a slot for every token") as error, method(vlm) as live:
        vlm.model.generate(**prompt(), max_new_tokens=2, cache_implementation="static")
    one_line(error)
    assert live.prefills == []


def test_the_grid_travels_with_the_inputs():
    vlm = untrained_vlm()
    short, long = (vlm.prepare(clip(frames), "What moves?") for frames in (4, 8))
    with Dense()(vlm) as live, torch.inference_mode():
        vlm.prefill(short)
        with pytest.raises(UserError, match="the visual grid of this forward is unknown") as error:
            vlm.model(**long.tensors)
        one_line(error)
        with vlm.running(long):
            vlm.model(**long.tensors)
        assert live.last.grid == long.grid
        with vlm.running(long):
            vlm.prefill(short)
            assert live.last.grid == short.grid
            vlm.model(**long.tensors)
            assert live.last.grid == long.grid


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_models_of_one_config_do_not_disturb_each_other(attention):
    shared = family("llama", attention).model.config
    one, other = (vlm(AutoModelForCausalLM.from_config(shared), seed=seed) for seed in (1, 2))
    assert one.model.model.config is other.model.model.config
    plain, other_plain = run(one), run(other)
    focus = Focus(selected_layers=(1,), retention=(0.3,), vector_size=8, m_tile=64)
    first, second = focus(one), Dense()(other)
    first.__enter__()
    assert torch.equal(run(other), other_plain)
    second.__enter__()
    assert torch.equal(run(other), other_plain)
    assert run(one).shape[1] < TOKENS
    first.__exit__(None, None, None)  # left in the order they were entered
    assert torch.equal(run(one), plain)
    assert torch.equal(run(other), other_plain)
    second.__exit__(None, None, None)
    assert torch.equal(run(other), other_plain)
    assert shared._attn_implementation == attention


@dataclass(frozen=True)
class EverySecond(Dense):
    """Drops every second visual token before a layer."""

    layer: int = 0

    def before_attention(self, prefill, layer, hidden):
        if layer != self.layer:
            return hidden, None
        keep = torch.ones(len(hidden), dtype=torch.bool)
        keep[prefill.visual.start + 1 : prefill.visual.stop : 2] = False
        return hidden, keep.nonzero().squeeze(1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_deepstack_keeps_step_with_drops(attention):
    vlm, inputs = qwen3_vl(attention)
    decoder, seen = vlm.model.model.language_model, {}
    before, plain = module_state(decoder), run(vlm, inputs)
    with Dense()(vlm):
        assert torch.equal(run(vlm, inputs), plain)
    for layers in ((0,), (1,), (2,), (0, 1, 2), (3,)):
        assert decoding_error(vlm, inputs, layers, (0.6, 0.4, 0.2)[: len(layers)], steps=8) < 2e-5
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with EverySecond()(vlm):
        got = run(vlm, inputs)
    hook.remove()
    keep = torch.ones(28, dtype=torch.bool)
    keep[5:20:2] = False
    fewer = {
        "inputs_embeds": seen["inputs_embeds"][:, keep],
        "position_ids": seen["position_ids"][..., keep],
        "visual_pos_masks": seen["visual_pos_masks"][:, keep],
        "deepstack_visual_embeds": [embeds[::2] for embeds in seen["deepstack_visual_embeds"]],
        "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long),
    }
    expected = vlm.model.lm_head(decoder(**fewer, use_cache=False).last_hidden_state)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert module_state(decoder) == before


@torch.inference_mode()
def test_a_copied_cache_decodes_on():
    vlm = family("qwen2", "eager")
    with Focus(selected_layers=(0, 1), retention=(0.6, 0.3), vector_size=8, m_tile=64)(vlm):
        past = vlm.model(**prompt(), use_cache=True).past_key_values
        twin, step = copy.deepcopy(past), {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[TOKENS]])}
        expected = vlm.model(**step, past_key_values=past).logits
        assert torch.equal(vlm.model(**step, past_key_values=twin).logits, expected)


def test_a_config_object_is_not_written_to():
    config = LlamaConfig(**{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "vocab_size": 96})  # fmt: skip
    one = vlm(AutoModelForCausalLM.from_config(config))
    with Dense()(one):
        run(one)
        assert one.model.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_what_cannot_follow_a_drop_is_refused():
    focus = Focus(selected_layers=(0,), retention=(0.3,), sec_only=True, vector_size=8)
    vlm, marks = family("llama", "sdpa"), torch.zeros(1, TOKENS, 3)
    with Dense()(vlm):
        vlm.model(**prompt(), marks=marks)
    with pytest.raises(UserError, match="LlamaDecoderLayer is given `marks` for every token") as error, focus(vlm):
        vlm.model(**prompt(), marks=marks)
    one_line(error)
    ATTENTION["maskless"] = ATTENTION["sdpa"]  # as flash attention: the window is its own affair
    windowed = family("mistral", "sdpa", **WINDOW)
    windowed.model.config._attn_implementation_internal = "maskless"
    with pytest.raises(UserError, match="maskless attention keeps its mask to itself") as error, focus(windowed):
        run(windowed)
    one_line(error)
    with pytest.raises(UserError, match="maskless attention cannot hide padding") as error, EverySecond()(windowed):
        run(windowed)
    one_line(error)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["granite4_vision", "idefics"])
def test_what_a_decoder_does_between_its_layers_is_refused_after_a_drop(name, attention):
    family = tried(name, attention)  # features, and cross-attention, in the loop over the layers
    model, inputs = family.model, family.inputs
    with torch.inference_mode():
        plain = model.model(**inputs, use_cache=False).logits
        with Dense()(model):
            assert torch.equal(model.model(**inputs, use_cache=False).logits, plain)
        with pytest.raises(UserError, match="changes hidden states before its layer 1"):
            decoding_error(model, inputs, (0,), (0.6,), steps=1)
        last = 2 if name == "idefics" else 1
        assert decoding_error(model, inputs, (last,), (0.6,), steps=4) < 2e-5


def test_a_change_between_layers_that_no_shape_betrays_is_found():
    model = family("llama", "sdpa")

    def nudge(layer, args):
        args[0][:, 5:8] += 1.0  # these tokens of the whole prompt, in place

    hook = model.model.model.layers[2].register_forward_pre_hook(nudge)
    settings = {"retention": (0.5,), "vector_size": 8, "m_tile": 64}
    early = Focus(selected_layers=(0,), **settings)
    with torch.inference_mode(), early(model), pytest.raises(UserError, match="before its layer 2"):
        model.model(**prompt(), use_cache=False)
    with torch.inference_mode(), Focus(selected_layers=(2,), **settings)(model):
        model.model(**prompt(), use_cache=False)
    hook.remove()
    with torch.inference_mode(), early(model):
        model.model(**prompt(), use_cache=False)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_decoding_by_hand_is_that_of_generate(name):
    model, inputs = (family("llama", "sdpa"), prompt()) if name == "llama" else qwen3_vl("sdpa")
    with EverySecond()(model):
        settings = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": MARKERS}
        answer = model.model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
        new = answer.sequences[:, inputs["input_ids"].shape[1] :]
        out = model.model(**inputs, use_cache=True)
        for step, expected in enumerate(answer.logits):
            torch.testing.assert_close(out.logits[0, -1], expected[0], rtol=0, atol=1e-6)
            whole = model.model(**longer(inputs, new[:, :step]), use_cache=False)
            torch.testing.assert_close(whole.logits[0, -1], expected[0], rtol=0, atol=2e-5)
            past = copy.deepcopy(out.past_key_values)
            out = model.model(input_ids=new[:, step : step + 1], past_key_values=past, use_cache=True)
            assert past.get_seq_length() == inputs["input_ids"].shape[1] + step + 1


def test_labels_and_chunks_are_refused_in_one_line():
    model, inputs = family("llama", "sdpa"), prompt()
    settings = {"selected_layers": (0,), "retention": (0.5,), "vector_size": 8, "m_tile": 64}
    with Dense()(model), torch.no_grad():
        assert model.model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    with Focus(**settings)(model), pytest.raises(UserError, match="focus: labels are for every token of the prompt"):
        model.model(**inputs, labels=inputs["input_ids"])
    with Focus(**settings)(model), pytest.raises(UserError, match=r"one forward pass \(no prefill_chunk_size"):
        model.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


GRADIENTS = [
    Asks(), Focus(selected_layers=(0, 1), retention=(0.6, 0.4), similarity_threshold=0.1, vector_size=8, m_tile=64),
    FrameFusion(cost=0.5), Adaptiv(threshold=0.3), Cmc(linear_threshold=0.7, interval=3, i_frame=1),
    FastV(), Random(), FewerPixels(),
]  # fmt: skip


@pytest.mark.parametrize("method", GRADIENTS, ids=lambda method: type(method).__name__.lower())
def test_gradients_flow_through_a_method(method):
    """They are those of the same prefill with a step along them: the choices that a method makes stay as they are."""
    model = family("llama", "sdpa").model.double()
    vlm = SimpleNamespace(model=model, grid=GRID)
    weight = model.model.layers[0].mlp.down_proj.weight

    def loss() -> torch.Tensor:
        with method(vlm):
            return model(**prompt(), use_cache=False).logits.pow(2).mean()

    loss().backward()
    gradient = weight.grad.clone()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-5 * gradient / gradient.norm()
            ends.append(loss())
            weight -= sign * 1e-5 * gradient / gradient.norm()
    assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(gradient.norm()), rel=1e-2)
