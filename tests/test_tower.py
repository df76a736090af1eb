"""The vision tower's attention as methods get it, and VisionZip and FlashVID, which read it."""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tiny_families import family, prompt, qwen3_vl
from tiny_models import clip, module_state, untrained_vlm
from transformers import CLIPVisionConfig, CLIPVisionModel

from focuslib.errors import UserError
from focuslib.kernels.contextual import add_means, dominant_and_contextual
from focuslib.kernels.trees import compress_segment, segment_lengths
from focuslib.methods import FlashVid, VidCom2, VisionZip
from focuslib.methods.base import Method
from focuslib.methods.flashvid import spread
from focuslib.prefill.tower import Picture, has_cls, merged, see, watch

torch.set_num_threads(1)
EXACT = {"rtol": 0, "atol": 1e-5}
FRAMES = 6


@dataclass(frozen=True)
class Watches(Method):
    """Notes what the tower attended to."""

    name = "watches"
    layer: int = -1
    shape: tuple = (6, 6)

    @property
    def watched_layer(self):
        return self.layer

    def end(self, prefill):
        frames = prefill.grid.length // math.prod(self.shape)
        seen = prefill.tower([self.shape] * frames)
        prefill.record.details |= {"received": seen.received, "keys": seen.keys}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-1, -2, 0])
@torch.inference_mode()
def test_the_attention_that_tokens_receive(attention, layer):
    """Against the tower's own attention matrices, pooled as the model pools its features."""
    vlm, frames = untrained_vlm(attention), clip(FRAMES)
    plain = vlm.prefill(vlm.prepare(frames, "What moves?"))
    before = module_state(vlm.model)
    with Watches(layer)(vlm) as run:
        logits = vlm.prefill(vlm.prepare(frames, "What moves?"))
        again = vlm.prefill(vlm.prepare(frames, "What moves?"))
    assert torch.equal(logits, plain) and torch.equal(again, plain)
    assert module_state(vlm.model) == before
    eager = untrained_vlm("eager")
    tower = eager.model.model.vision_tower
    keys = []
    hook = tower.encoder.layers[layer].self_attn.k_proj.register_forward_hook(lambda *args: keys.append(args[2]))
    matrices = tower(eager.pixel_values(frames), output_attentions=True).attentions[layer]
    hook.remove()
    side = math.isqrt(matrices.shape[-1])
    received = matrices.mean((1, 2)).view(FRAMES, 1, side, side)
    expected = F.interpolate(received, (6, 6), mode="bilinear").flatten()
    torch.testing.assert_close(run.last.details["received"], expected, rtol=0, atol=1e-6)
    heads = tower.config.num_attention_heads
    keys = keys[0].view(FRAMES, side**2, heads, -1).mean(2).transpose(1, 2).reshape(FRAMES, -1, side, side)
    expected = F.interpolate(keys, (6, 6), mode="bilinear").flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(run.last.details["keys"], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_one_picture_is_its_matrix_row_by_row():
    q, k = torch.randn(3, 10, 4), torch.randn(3, 10, 4)
    weights = torch.stack([
        torch.stack([(0.5 * q[head, row] @ k[head].T).double().softmax(-1) for row in range(10)]) for head in range(3)
    ])  # fmt: skip
    plain, first = see(q, k, 0.5, None, cls=False), see(q, k, 0.5, None, cls=True)
    torch.testing.assert_close(plain.received.double(), weights.mean((0, 1)), **EXACT)
    torch.testing.assert_close(first.received.double(), weights.mean(0)[0, 1:], **EXACT)
    assert len(plain.keys) == 10 and torch.equal(first.keys, k.mean(0)[1:])
    assert has_cls(10) and has_cls(577) and not has_cls(9) and not has_cls(729)


@torch.inference_mode()
def test_a_tower_with_cls():
    """CLIP: the score of a patch is the CLS token's row, which is itself no patch."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config._attn_implementation = "eager"
    tower, pixels = CLIPVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
    matrices = tower(pixels, output_attentions=True).attentions[-2]
    with ExitStack() as undo:
        watched = watch(tower, torch.nn.Identity(), -2, undo)
        tower(pixels)
    seen = watched.pooled([(4, 4), (2, 2)])
    expected = matrices[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(seen.received[:16], expected[0], rtol=0, atol=1e-6)
    halves = expected[1].view(2, 2, 2, 2).mean((1, 3)).flatten()
    torch.testing.assert_close(seen.received[16:], halves, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="the vision tower saw 2 pictures and the prompt has 1 frames"):
        watched.pooled([(4, 4)])


def test_patches_that_the_tower_merges():
    received, keys = torch.arange(16.0), torch.arange(32.0).view(16, 2)
    pictures = [Picture(received[:8], keys[:8]), Picture(received[8:], keys[8:])]  # two windows
    seen = merged(pictures, 4, torch.tensor([2, 0, 3, 1]), 4)
    assert seen.received.tolist() == [5.5, 13.5, 1.5, 9.5]
    assert torch.equal(seen.keys[2], keys[:4].mean(0))
    with pytest.raises(UserError, match="16 patches are not 4 for each of 5 visual tokens"):
        merged(pictures, 4, None, 5)


@torch.inference_mode()
def test_a_tower_that_merges_inside_the_model():
    vlm, inputs = qwen3_vl("eager")
    plain = vlm.model(**inputs, use_cache=False).logits
    with Watches(-1, (4, 4))(vlm) as run:
        assert torch.equal(vlm.model(**inputs, use_cache=False).logits, plain)
    assert run.last.details["received"].shape == (16,)
    assert float(run.last.details["received"].sum()) == pytest.approx(1 / 4, abs=1e-5)  # rows sum to 1; 4 patches each


def test_a_method_that_watches_says_what_is_missing():
    vlm = untrained_vlm()
    inputs = vlm.prepare(clip(), "What moves?")
    with pytest.raises(UserError, match="prepare the prompt inside the method's block"), VisionZip()(vlm):
        vlm.prefill(inputs)
    with pytest.raises(UserError, match="layer -9 does not exist"), VisionZip(tower_layer=-9)(vlm):
        pass
    with pytest.raises(UserError, match="Qwen2ForCausalLM has no vision tower"), VisionZip()(family("qwen2", "sdpa")):
        pass
    with pytest.raises(UserError, match="they read different layers"), (VisionZip() | FlashVid())(vlm):
        pass


def shorter(vlm, inputs, content):
    """The model on a prompt whose visual tokens are these [k, D]."""
    grid, embeds = inputs.grid, inputs.tensors["inputs_embeds"][0]
    short = torch.cat([embeds[: grid.start], content, embeds[grid.stop :]])
    return vlm.model(inputs_embeds=short[None], use_cache=False).logits


@torch.inference_mode()
def test_visionzip_is_the_model_on_what_it_made():
    vlm = untrained_vlm()
    with Watches(-2)(vlm) as run:
        inputs = vlm.prepare(clip(FRAMES), "What moves?")
        vlm.prefill(inputs)
    seen = run.last.details
    x = inputs.tensors["inputs_embeds"][0][inputs.grid.start : inputs.grid.stop].view(FRAMES, 36, -1)
    made = []
    for frame in range(FRAMES):
        score, keys = seen["received"].view(FRAMES, 36)[frame], seen["keys"].view(FRAMES, 36, -1)[frame]
        kept, joins = dominant_and_contextual(score, keys, 6, 3)
        made.append(add_means(x[frame], joins)[kept])
    with VisionZip(retention=0.25, contextual=1 / 3)(vlm) as run:
        logits = vlm.prefill(vlm.prepare(clip(FRAMES), "What moves?"))
    torch.testing.assert_close(logits, shorter(vlm, inputs, torch.cat(made)), **EXACT)
    assert run.last.attended == [54] * 8


@torch.inference_mode()
def test_flashvid_is_the_model_on_what_it_made():
    vlm = untrained_vlm()
    with Watches(-1)(vlm) as run:
        inputs = vlm.prepare(clip(FRAMES), "What moves?")
        vlm.prefill(inputs)
    received = run.last.details["received"].view(FRAMES, 36)
    x = inputs.tensors["inputs_embeds"][0][inputs.grid.start : inputs.grid.stop].view(FRAMES, 36, -1)
    made, first = [], 0
    for length in segment_lengths(x.mean(1), 0.9, 3):
        part = slice(first, first + length)
        made.append(compress_segment(x[part], received[part], 9, 3, 0.8)[0])
        first += length
    made = torch.cat(made)
    method = FlashVid(least_segments=3, inner_retention=1)
    with method(vlm) as run:
        logits = vlm.prefill(vlm.prepare(clip(FRAMES), "What moves?"))
    assert run.last.attended == [len(made)] * 8
    torch.testing.assert_close(logits, shorter(vlm, inputs, made), **EXACT)
    with FlashVid(least_segments=3)(vlm) as run:
        vlm.prefill(vlm.prepare(clip(FRAMES), "What moves?"))
    assert run.last.attended == [len(made)] * 6 + [math.ceil(0.3 * len(made))] * 2


@dataclass(frozen=True)
class Replay(FlashVid):
    """FlashVID that keeps given tokens before its inner layer."""

    kept: tuple = ()

    def before_attention(self, prefill, layer, hidden):
        if self.kept and layer == prefill.state["layer"]:
            prefill.renumber(False)
            return hidden, prefill.keep(torch.isin(prefill.present, torch.tensor(self.kept)))
        return super().before_attention(prefill, layer, hidden)


@pytest.mark.parametrize(
    "method",
    [VisionZip(), FlashVid(), VisionZip(order="place", positions="original"), FlashVid(positions="original")],
    ids=lambda method: f"{method.name}-{method.positions}",
)
@torch.inference_mode()
def test_cached_decoding_equals_recomputation_and_the_model_is_restored(method, monkeypatch):
    vlm, frames = untrained_vlm(), clip(FRAMES)
    vlm.model.generation_config.eos_token_id = None
    plain = vlm.prefill(vlm.prepare(frames, "What moves?"))
    before = module_state(vlm.model)
    with method(vlm) as run:
        inputs = vlm.prepare(frames, "What moves?")
        with vlm.running(inputs):
            cached = vlm.model.generate(
                **inputs.tensors, do_sample=False, max_new_tokens=10, output_logits=True, return_dict_in_generate=True
            )
    ids, embeds = cached.sequences[0], inputs.tensors["inputs_embeds"]
    again = method
    if isinstance(method, FlashVid):
        again = Replay(kept=tuple(run.last.left.tolist()), positions=method.positions)
    for step in range(10):
        longer = torch.cat([embeds, vlm.model.get_input_embeddings()(ids[:step])[None]], 1)
        with again(vlm):
            inputs = vlm.prepare(frames, "What moves?")
            with vlm.running(inputs):
                logits = vlm.model(inputs_embeds=longer, use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, cached.logits[step][0], rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=f"{method.name} is installed on this model already"), method(vlm), method(vlm):
        pass
    monkeypatch.setattr(vlm.model.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), method(vlm):
        vlm.prefill(vlm.prepare(frames, "What moves?"))
    monkeypatch.undo()
    assert module_state(vlm.model) == before
    assert torch.equal(vlm.prefill(vlm.prepare(frames, "What moves?")), plain)


@pytest.mark.parametrize("kind", [VisionZip, FlashVid], ids=lambda kind: kind.name)
@pytest.mark.parametrize("target", [0.5, 0.75])
@torch.inference_mode()
def test_a_target_sparsity_is_met(kind, target):
    vlm = untrained_vlm()
    with kind(target_sparsity=target)(vlm) as run:
        vlm.prefill(vlm.prepare(clip(8), "What moves?"))
    assert run.sparsity == pytest.approx(target, abs=0.015)


def test_numbers_are_spread():
    assert spread(torch.tensor([0, 0, 0, 4, 9, 9]), 10).tolist() == [0, 1, 2, 4, 8, 9]
    assert spread(torch.tensor([2, 3, 3, 3]), 5).tolist() == [1, 2, 3, 4]


@torch.inference_mode()
def test_flashvid_needs_a_video():
    vlm = family("qwen2", "sdpa")
    vlm.grid = vlm.grid.__class__(4, 24, 1, 4, 6, 24, 6)
    method = FlashVid()
    with pytest.raises(UserError, match="has no vision tower"), method(vlm):
        pass
    with VidCom2()(vlm):
        vlm.model(**prompt(), use_cache=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionZip(retention=0), "visionzip: retention is 0"),
        (lambda: VisionZip(contextual=1.5), "visionzip: contextual is 1.5"),
        (lambda: VisionZip(order="size"), "visionzip: order is 'size'; it must be published or place"),
        (lambda: VisionZip(positions="old"), "visionzip: positions is 'old'; it must be published or original"),
        (lambda: FlashVid(positions="old"), "flashvid: positions is 'old'; it must be published or original"),
        (lambda: VisionZip(target_sparsity=1), "visionzip: target_sparsity is 1"),
        (lambda: FlashVid(layer=0), "flashvid: layer is 0"),
        (lambda: FlashVid(retention=2), "flashvid: retention is 2"),
        (lambda: FlashVid(diverse=-1), "flashvid: diverse is -1"),
        (lambda: FlashVid(inner_retention=0), "flashvid: inner_retention is 0"),
        (lambda: FlashVid(expansion=0.5), "flashvid: expansion is 0.5; it must be at least 1"),
        (lambda: FlashVid(least_segments=0), "flashvid: least_segments is 0"),
        (lambda: FlashVid(similarity=-2), "flashvid: similarity is -2"),
        (lambda: FlashVid(segment_similarity=-2), "flashvid: segment_similarity is -2"),
        (lambda: FlashVid(target_sparsity=-1), "flashvid: target_sparsity is -1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=f"method {message}"):
        make()
