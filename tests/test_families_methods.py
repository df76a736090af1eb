"""Every method on today's families by the generic adapter: exact while decoding, restored, or refused in one line."""

from dataclasses import dataclass, field

import pytest
import torch
from test_families import loaded, media_of
from tiny_families import CHECKPOINTS, VIDEO_FAMILIES
from tiny_models import module_state

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
    Method,
    PyramidDrop,
    Random,
    Uniform,
    VidCom2,
    VisionZip,
)

torch.set_num_threads(1)
STEPS = 6
METHODS = [
    Focus(selected_layers=(0, 2), retention=(0.6, 0.3), vector_size=8, m_tile=64), FrameFusion(cost=0.5),
    FrameFusion(target_sparsity=0.4, similarity_lower_bound=0.9), Adaptiv(threshold=0.3),
    Cmc(linear_threshold=0.7, interval=3, i_frame=1), FastV(layer=2), Evs(retention=0.5), VidCom2(retention=0.4),
    PyramidDrop(layers=(1, 3), retention=(0.6, 0.3)), DyCoke(decoding_retention=1), VisionZip(retention=0.5),
    VisionZip(retention=0.5, contextual=0, tower_layer=-1), FlashVid(retention=0.5, layer=3), Random(), Uniform(),
    FewerFrames(retention=0.4), FewerPixels(),
]  # fmt: skip
COMPARE_FRAMES = ("framefusion", "cmc", "evs", "dycoke", "flashvid", "fewer_frames")


def named(value):
    return f"{value.name}{'-target' if getattr(value, 'target_sparsity', None) else ''}"


@dataclass(frozen=True)
class AsBefore(Method):
    """A method on a prompt and an answer in one pass: it sees the queries and keys of the prompt alone."""

    name = "as_before"
    method: Method = field(default_factory=Random)
    answer: int = 0

    @property
    def watched_layer(self):
        return self.method.watched_layer

    def begin(self, prefill, embeds):
        self.method.begin(prefill, embeds[: len(embeds) - self.answer])

    def before_attention(self, prefill, layer, hidden):
        whole = prefill.coming

        def coming(hidden):
            queries, keys, scaling = whole(hidden)
            self._mask(prefill)
            prompt = queries.shape[1] - self.answer
            return queries[:, :prompt], keys[:, :prompt], scaling

        prefill.coming = coming
        return self.method.before_attention(prefill, layer, hidden)

    def on_attention(self, prefill, layer, queries, keys, scaling):
        self._mask(prefill)
        prompt = queries.shape[1] - self.answer
        seen = self.method.on_attention(prefill, layer, queries[:, :prompt], keys[:, :prompt], scaling)
        return torch.cat([seen, queries[:, prompt:]], 1)

    def _mask(self, prefill):
        whole = prefill.running_mask

        def mask():
            full = whole()
            return None if full is None else full[..., : full.shape[-2] - self.answer, : full.shape[-1] - self.answer]

        prefill.running_mask = mask

    def at_site(self, prefill, layer, site, x):
        return self.method.at_site(prefill, layer, site, x)

    def wants_probabilities(self, prefill, layer):
        return self.method.wants_probabilities(prefill, layer)

    def on_probabilities(self, prefill, layer, head, probabilities):
        return self.method.on_probabilities(prefill, layer, head, probabilities)

    def after_attention(self, prefill, layer, hidden):
        return self.method.after_attention(prefill, layer, hidden)

    def end(self, prefill):
        self.method.end(prefill)


def decoding_error(vlm, method, media) -> float:
    """The largest difference of logits between cached decoding and one pass over prompt and answer."""
    with method(vlm) as run:
        inputs = vlm.prepare(media, "What moves?")
        with vlm.running(inputs):
            answer = vlm.model.generate(
                **inputs.tensors, do_sample=False, max_new_tokens=STEPS, output_logits=True,
                return_dict_in_generate=True,
                suppress_tokens=list(range(95, vlm.model.config.get_text_config().vocab_size)),
            )  # fmt: skip
    assert run.sparsity > 0
    oracle = AsBefore(method, 0 if method.name == "cmc" else STEPS - 1)  # CMC ranks nothing, and takes all queries
    with oracle(vlm) as again:
        inputs = vlm.prepare(media, "What moves?")
        new = answer.sequences[:, inputs.tensors["input_ids"].shape[1] : -1]
        longer = {**inputs.tensors, "input_ids": torch.cat([inputs.tensors["input_ids"], new], 1)}
        for name in {"attention_mask", "mm_token_type_ids"} & longer.keys():
            value = int(name == "attention_mask")
            longer[name] = torch.nn.functional.pad(longer[name], (0, STEPS - 1), value=value)
        with vlm.running(inputs):
            logits = vlm.model(**longer, use_cache=False).logits[0, -STEPS:]
    assert [kept.tolist() for kept in again.last.kept.values()] == [kept.tolist() for kept in run.last.kept.values()]
    return float((logits - torch.cat(answer.logits)).abs().max())


def state_of(model):
    """Everything a patch could leave behind; what Qwen notes of its last prompt is its own."""
    state = module_state(model)
    for attributes, _, _ in state.values():
        attributes.pop("rope_deltas", None)
    return state


@pytest.mark.parametrize("method", METHODS, ids=named)
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_cached_decoding_equals_recomputation(family_checkpoint, name, method, monkeypatch):
    vlm = loaded(family_checkpoint(name, tower=3))
    media = media_of(name)
    plain = vlm.prefill(vlm.prepare(media, "What moves?"))
    before = state_of(vlm.model)  # after a first run, in which transformers may leave hooks of its own
    if name not in VIDEO_FAMILIES and method.name in COMPARE_FRAMES:
        with pytest.raises(UserError, match=f"method {method.name}: the input has one frame"), method(vlm):
            vlm.prefill(vlm.prepare(media, "What moves?"))
    else:
        assert decoding_error(vlm, method, media) < 2e-5
        again = pytest.raises(UserError, match=f"{method.name} is installed on this model already")
        with method(vlm), again, method(vlm):
            pass
        monkeypatch.setattr(vlm.model.lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), method(vlm):
            vlm.prefill(vlm.prepare(media, "What moves?"))
        monkeypatch.undo()
    assert state_of(vlm.model) == before
    assert torch.equal(vlm.prefill(vlm.prepare(media, "What moves?")), plain)
