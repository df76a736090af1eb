"""The decoding event: what a token decoded later sees of the cache, against recomputation with the rest masked."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_families import GRID, IMAGE, family, prompt, qwen3_vl
from tiny_models import module_state

from focuslib.errors import UserError
from focuslib.methods import Dense, DyCoke, FastV, Random
from focuslib.methods.base import Method

torch.set_num_threads(1)
WHOLE = {"retention": 1, "order": "place", "odd_last": "keep"}  # DyCoke that merges nothing
RUNS = replace(GRID, start=4, runs=((4, 5), (12, 12), (26, 7)))
STEPS = 8
FAMILIES = [
    ("qwen2", "sdpa", {}), ("qwen2", "eager", {}), ("qwen3", "sdpa", {}), ("llama", "eager", {}),
    ("gemma", "sdpa", {}), ("stablelm", "sdpa", {}), ("mistral", "sdpa", {"sliding_window": 20}),
    ("mistral", "eager", {"sliding_window": 30}), ("smollm3", "sdpa", {}),
]  # fmt: skip


@dataclass(frozen=True)
class Hides(Method):
    """Hides from every decoded token some visual entries of the layers from 1 on, others in each step."""

    name = "hides"
    told: list = field(default_factory=list)

    def on_decoding(self, decoding, layer):
        step = decoding.state["step"] = decoding.state.get("step", 0) + (layer == 0)
        self.told.append((layer, step, decoding.present.tolist()))
        return None if layer == 0 else decoding.keep((decoding.present + step) % 3 > 0)


@dataclass(frozen=True)
class Masked(Method):
    """In one pass over prompt and answer: the rows of the last tokens without what `shown` hides from them."""

    name = "masked"
    rows: int = STEPS
    first: int = 1
    merging: Method = field(default_factory=Dense)

    def begin(self, prefill, embeds):
        self.merging.begin(prefill, embeds)

    def before_attention(self, prefill, layer, hidden):
        return self.merging.before_attention(prefill, layer, hidden)

    def wants_probabilities(self, prefill, layer):
        return layer >= self.first - 1

    def on_probabilities(self, prefill, layer, head, probabilities):
        visual = torch.arange(len(probabilities))[prefill.visual]
        for number in range(self.rows):
            row = probabilities[len(probabilities) - self.rows + number]
            shown = self.shown(prefill, layer, number, row[visual])
            if shown is not None and layer >= self.first:
                row[[int(visual[place]) for place in range(len(visual)) if place not in shown]] = 0
                row /= row.sum()
        return probabilities

    def shown(self, prefill, layer, number, row):
        return [place for place in range(len(row)) if (place + number + 1) % 3 > 0]


@dataclass(frozen=True)
class RecomputedDyCoke(Masked):
    """DyCoke's decoding half from the paper, of attention matrices of the whole sequence, in float64."""

    retention: float = 0.3
    similarity: float = 0.9

    def shown(self, prefill, layer, number, row):
        heads = prefill.state.setdefault("heads", [0] * self.rows)
        if layer == self.first - 1:
            heads[number] = heads[number] + row.double() / prefill.shape.heads
            return None
        now, before = heads[number], heads[number - 1] if number else None
        if before is not None and float(now @ before / (now.norm() * before.norm())) >= self.similarity:
            return None
        return sorted(range(len(now)), key=lambda place: -float(now[place]))[: int(len(now) * self.retention)]


def generated(vlm, method, inputs):
    with method(vlm) as run:
        answer = vlm.model.generate(
            **inputs, do_sample=False, max_new_tokens=STEPS + 1, suppress_tokens=[IMAGE, 91, 92, 93],
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return answer, run.last


def recomputed(vlm, oracle, inputs, answer):
    """The logits of one pass over the prompt and its answer, for the decoded tokens."""
    new = answer.sequences[:, inputs["input_ids"].shape[1] : -1]
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, STEPS), value=int(name == "attention_mask"))
    with oracle(vlm):
        return vlm.model(**longer, use_cache=False).logits[0, -STEPS:]


@pytest.mark.parametrize(("name", "attention", "settings"), FAMILIES, ids=str)
@torch.inference_mode()
def test_hidden_entries_are_masked_ones(name, attention, settings):
    vlm, inputs, method = family(name, attention, **settings), prompt(), Hides()
    before, plain = module_state(vlm.model), vlm.model(**inputs).logits
    answer, record = generated(vlm, method, inputs)
    expected = recomputed(vlm, Masked(), inputs, answer)
    torch.testing.assert_close(torch.cat(answer.logits[1:]), expected, rtol=0, atol=2e-5)
    assert record.decoded == STEPS and record.hidden > 0
    assert module_state(vlm.model) == before and torch.equal(vlm.model(**inputs).logits, plain)
    if "sliding_window" not in settings:
        assert method.told == [(layer, step, list(range(24))) for step in range(1, STEPS + 1) for layer in range(3)]
        assert record.hidden == STEPS * 2 * 8
        assert record.decoding_sparsity == pytest.approx(2 / 3 * 1 / 3)


@pytest.mark.parametrize("similarity", [0.9, 0.999, 1.0])
@pytest.mark.parametrize(("name", "attention", "settings"), FAMILIES, ids=str)
@torch.inference_mode()
def test_dycoke_sees_what_its_paper_says(name, attention, settings, similarity):
    vlm, inputs = family(name, attention, **settings), prompt()
    method = DyCoke(**WHOLE, decoding_layer=1, decoding_similarity=similarity)
    answer, record = generated(vlm, method, inputs)
    expected = recomputed(vlm, RecomputedDyCoke(similarity=similarity), inputs, answer)
    torch.testing.assert_close(torch.cat(answer.logits[1:]), expected, rtol=0, atol=2e-5)
    if "sliding_window" not in settings:
        steps, rest = divmod(record.hidden, 2 * 17)
        assert rest == 0 and 1 <= steps <= STEPS and (similarity < 1 or steps == STEPS)


@pytest.mark.parametrize("settings", [{}, {"order": "place"}, {"retention": 0.6, "decoding_layer": 2}], ids=str)
@pytest.mark.parametrize(("name", "attention", "own"), FAMILIES, ids=str)
@torch.inference_mode()
def test_both_halves_of_dycoke(name, attention, own, settings):
    vlm, inputs = family(name, attention, **own), prompt()
    method = DyCoke(**{"decoding_layer": 1, "decoding_similarity": 0.99, "decoding_retention": 0.5, **settings})
    before, plain = module_state(vlm.model), vlm.model(**inputs).logits
    answer, record = generated(vlm, method, inputs)
    oracle = RecomputedDyCoke(first=method.decoding_layer, merging=method, retention=0.5, similarity=0.99)
    expected = recomputed(vlm, oracle, inputs, answer)
    torch.testing.assert_close(torch.cat(answer.logits[1:]), expected, rtol=0, atol=2e-5)
    assert record.hidden > 0 and record.decoding_sparsity > 1 - sum(record.attended) / (3 * 24)
    assert module_state(vlm.model) == before and torch.equal(vlm.model(**inputs).logits, plain)


@torch.inference_mode()
def test_positions_of_several_axes_and_deepstack():
    vlm, inputs = qwen3_vl("sdpa")
    answer, record = generated(vlm, Hides(), inputs)

    expected = recomputed(vlm, Masked(), inputs, answer)
    torch.testing.assert_close(torch.cat(answer.logits[1:]), expected, rtol=0, atol=2e-5)
    assert record.hidden > 0


@torch.inference_mode()
def test_padding_and_several_runs():
    vlm, inputs = family("qwen2", "sdpa"), prompt()
    vlm.grid = RUNS
    plain, _ = generated(vlm, Hides(), inputs)
    expected = recomputed(vlm, Masked(), inputs, plain)
    torch.testing.assert_close(torch.cat(plain.logits[1:]), expected, rtol=0, atol=2e-5)
    vlm.grid = replace(GRID, start=GRID.start + 7, runs=tuple((start + 7, size) for start, size in RUNS.runs))
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (7, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (7, 0)),
    }
    answer, _ = generated(vlm, Hides(), padded)
    torch.testing.assert_close(torch.cat(answer.logits), torch.cat(plain.logits), rtol=0, atol=2e-5)


@torch.inference_mode()
def test_what_a_method_does_not_hide_changes_no_bit():
    vlm, inputs = family("qwen2", "sdpa"), prompt()
    plain = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=9, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    for method in (Dense(), DyCoke(**WHOLE, decoding_retention=1)):
        with method(vlm) as run:
            got = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=9, output_logits=True,
                                     return_dict_in_generate=True)  # fmt: skip
        assert torch.equal(torch.cat(got.logits), torch.cat(plain.logits))
        assert (run.last.decoded, run.last.hidden, run.last.decoding_sparsity) == (8, 0, 0)
    with Random(retention=0.5)(vlm) as run:
        vlm.model.generate(**inputs, do_sample=False, max_new_tokens=3)
    assert run.last.decoding_sparsity == 0.5


@torch.inference_mode()
def test_caches_do_not_mix():
    """Two answers decoded in turn, and a copied cache: each goes on from its own last step."""
    vlm, inputs, method = family("qwen2", "sdpa"), prompt(), DyCoke(**WHOLE, decoding_layer=1)
    tokens = torch.arange(10, 16).view(2, 3, 1)

    def step(cache, token):
        return vlm.model(input_ids=token.view(1, 1), past_key_values=cache).logits

    with method(vlm):
        alone = []
        for answer in tokens:
            cache = vlm.model(**inputs).past_key_values
            alone.append([step(cache, token) for token in answer])
        one, other = vlm.model(**inputs).past_key_values, vlm.model(**inputs).past_key_values
        for number in range(3):
            assert torch.equal(step(one, tokens[0, number]), alone[0][number])
            assert torch.equal(step(other, tokens[1, number]), alone[1][number])
        cache = vlm.model(**inputs).past_key_values
        step(cache, tokens[0, 0])
        twin = copy.deepcopy(cache)
        step(cache, tokens[1, 0])
        assert torch.equal(step(twin, tokens[0, 1]), alone[0][1])
    cache = vlm.model(**inputs).past_key_values  # filled by nobody's prefill
    whole = copy.deepcopy(cache)
    expected = step(whole, tokens[0, 0])
    with method(vlm):
        assert torch.equal(step(cache, tokens[0, 0]), expected)


@torch.inference_mode()
def test_stacked_and_restored_after_an_exception():
    vlm, inputs = family("qwen2", "sdpa"), prompt()
    before, plain = module_state(vlm.model), vlm.model(**inputs).logits
    stack = FastV(layer=1, retention=0.5) | Hides()
    _, record = generated(vlm, stack, inputs)
    present = record.left
    assert record.hidden == sum(int(((present + step) % 3 == 0).sum()) for step in range(1, STEPS + 1)) * 2

    @dataclass(frozen=True)
    class Breaks(Method):
        name = "breaks"

        def on_decoding(self, decoding, layer):
            raise ZeroDivisionError

    for method in (Breaks(), DyCoke(decoding_layer=1) | Breaks()):
        with pytest.raises(ZeroDivisionError):
            generated(vlm, method, inputs)
        assert module_state(vlm.model) == before and torch.equal(vlm.model(**inputs).logits, plain)


@pytest.mark.parametrize("settings", [{"decoding_layer": 0}, {"decoding_layer": -1}, {"decoding_retention": 1.5},
                                      {"decoding_similarity": 2}], ids=str)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(UserError, match=f"method dycoke: {next(iter(settings))}"):
        DyCoke(**settings)


@torch.inference_mode()
def test_what_cannot_be_is_refused():
    vlm, inputs = family("qwen2", "sdpa"), prompt()
    with pytest.raises(UserError, match="dycoke: decoding_layer: layer 3 does not exist; the model has 3"):
        generated(vlm, DyCoke(decoding_layer=3), inputs)
    with Hides()(vlm):
        cache = vlm.model(**inputs).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(UserError, match="method hides: 2 sequences after one prompt; decode one at a time"):
            vlm.model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    capped = family("qwen2", "sdpa")
    for layer in capped.model.model.layers:
        layer.self_attn.attn_logit_softcapping = 30.0
    with pytest.raises(UserError, match="attends with a soft cap; the attention rows a method asks for would be wrong"):
        generated(capped, DyCoke(decoding_layer=1), inputs)
