"""FastV, EVS, VidCom2, PyramidDrop, DyCoke and the controls on real decoders: the patch's bars, and their own rules."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_families import GRID, IMAGE, TOKENS, family, prompt, qwen3_vl
from tiny_models import module_state

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels.outliers import frame_counts, frame_shares, mean_similarities, outliers
from focuslib.kernels.temporal import temporal_merge
from focuslib.methods import (
    DyCoke,
    Evs,
    FastV,
    FewerFrames,
    FewerPixels,
    FrameFusion,
    PyramidDrop,
    Random,
    Uniform,
    VidCom2,
)
from focuslib.methods.base import Method
from focuslib.methods.budget import schedule_sparsity
from focuslib.prefill.record import Prefill

torch.set_num_threads(1)
RUNS = replace(GRID, start=4, runs=((4, 5), (12, 12), (26, 7)))
VIDEO = VisualGrid(3, 30, 5, 2, 3, 6, 3)
METHODS = [
    FastV(layer=1), Evs(retention=0.6), VidCom2(retention=0.4), PyramidDrop(layers=(1, 2), retention=(0.5, 0.25)),
    PyramidDrop(layers=(1, 2), retention=(0.5, 0.25), positions="original"), DyCoke(decoding_retention=1),
    DyCoke(order="place", decoding_retention=1), DyCoke(positions="original", decoding_retention=1),
    VidCom2(retention=0.4, positions="original"),
    Random(), Uniform(), FewerFrames(), FewerPixels(), FewerFrames(positions="original"),
    FewerPixels(positions="original"),
]  # fmt: skip
FAMILIES = [
    ("qwen2", "sdpa", {}), ("qwen2", "eager", {}), ("qwen3", "sdpa", {}), ("llama", "eager", {}),
    ("gemma", "sdpa", {}), ("stablelm", "sdpa", {}), ("mistral", "sdpa", {"sliding_window": 12}),
    ("smollm3", "sdpa", {}),
]  # fmt: skip


@dataclass(frozen=True)
class Replay(Method):
    """Keeps given tokens instead of choosing them."""

    name = "replay"
    kept: dict = field(default_factory=dict)
    renumbered: bool = False

    def begin(self, prefill, embeds):
        prefill.renumber(self.renumbered)

    def before_attention(self, prefill, layer, hidden):
        if layer not in self.kept:
            return hidden, None
        return hidden, prefill.keep(torch.isin(prefill.present, self.kept[layer]))


def named(value):
    if isinstance(value, Method):
        return f"{value.name}-{getattr(value, 'positions', getattr(value, 'order', ''))}".strip("-")
    return "+".join(value) if isinstance(value, dict) else str(value)


def run(vlm, inputs=None):
    return vlm.model(**(inputs or prompt()), use_cache=False)[0]


def decoding_error(vlm, method, inputs, steps=10):
    """The largest difference of logits between cached decoding and recomputation of the whole prompt."""
    with method(vlm) as prefill:
        answer = vlm.model.generate(
            **inputs, do_sample=False, max_new_tokens=steps, suppress_tokens=[IMAGE, 91, 92, 93], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert prefill.last.kept
    ranked_by_text = isinstance(method, (FastV, PyramidDrop))
    renumbered = isinstance(method, PyramidDrop) and method.positions == "published"
    again = Replay(prefill.last.kept, renumbered) if ranked_by_text else method
    new, worst = answer.sequences[:, inputs["input_ids"].shape[1] :], 0.0
    for step in range(steps):
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new[:, :step]], 1)}
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                longer[name] = torch.nn.functional.pad(inputs[name], (0, step), value=int(name == "attention_mask"))
        with again(vlm):
            logits = vlm.model(**longer, use_cache=False).logits[0, -1]
        worst = max(worst, float((logits - answer.logits[step][0]).abs().max()))
    return worst


@pytest.mark.parametrize("method", METHODS, ids=named)
@pytest.mark.parametrize(("name", "attention", "settings"), FAMILIES, ids=named)
@torch.inference_mode()
def test_cached_decoding_equals_recomputation_and_the_model_is_restored(name, attention, settings, method):
    vlm = family(name, attention, **settings)
    before, plain = module_state(vlm.model), run(vlm)
    assert decoding_error(vlm, method, prompt()) < 2e-5
    assert module_state(vlm.model) == before
    assert torch.equal(run(vlm), plain)


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.name not in ("evs", "dycoke", "fewer_frames")], ids=named
)
@torch.inference_mode()
def test_deepstack_and_positions_of_several_axes(method):
    vlm, inputs = qwen3_vl("sdpa")
    plain = run(vlm, inputs)
    assert decoding_error(vlm, method, inputs, steps=4) < 2e-5
    assert torch.equal(run(vlm, inputs), plain)


@pytest.mark.parametrize(
    "method",
    [VidCom2(), DyCoke(order="place"), PyramidDrop(layers=(1, 2), retention=(0.5, 0.25)), FewerFrames(retention=0.4)],
    ids=named,
)
@torch.inference_mode()
def test_original_positions_are_those_of_the_whole_prompt(method):
    """As if the tokens that stay had been named without a method: at their positions, or renumbered."""
    vlm, logits = family("qwen2", "sdpa"), {}
    for original in (True, False):
        with (replace(method, positions="original") if original else method)(vlm) as prefill:
            logits[original] = run(vlm)
        with Replay(prefill.last.kept, renumbered=not original)(vlm):
            torch.testing.assert_close(run(vlm), logits[original], rtol=0, atol=1e-6)
    assert float((logits[True] - logits[False]).abs().max()) > 1e-3


@pytest.mark.parametrize("method", METHODS, ids=named)
@torch.inference_mode()
def test_several_runs_of_visual_tokens(method):
    vlm = family("qwen2", "sdpa")
    vlm.grid = RUNS
    assert decoding_error(vlm, method, prompt()) < 2e-5


@pytest.mark.parametrize("method", METHODS, ids=named)
@torch.inference_mode()
def test_restored_after_an_exception_and_never_nested(method, monkeypatch):
    vlm = family("qwen2", "sdpa")
    before, plain = module_state(vlm.model), run(vlm)
    with pytest.raises(UserError, match=f"{method.name} is installed on this model already"), method(vlm), method(vlm):
        pass
    monkeypatch.setattr(vlm.model.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), method(vlm):
        run(vlm)
    monkeypatch.undo()
    assert module_state(vlm.model) == before
    assert torch.equal(run(vlm), plain)


@pytest.mark.parametrize("method", METHODS, ids=named)
@torch.inference_mode()
def test_padding_changes_nothing(method):
    vlm, inputs = family("qwen2", "sdpa"), prompt()
    with method(vlm) as whole:
        plain = run(vlm, inputs)
    vlm.grid = replace(GRID, start=GRID.start + 7)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (7, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (7, 0)),
    }
    with method(vlm) as shifted:
        got = vlm.model.generate(
            **padded, do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
    assert [kept.tolist() for kept in shifted.last.kept.values()] == [
        kept.tolist() for kept in whole.last.kept.values()
    ]
    torch.testing.assert_close(got.logits[0][0], plain[0, -1], rtol=0, atol=2e-5)


def video_embeds(seed=0, tokens=40, grid=VIDEO):
    """Embeddings of a clip that drifts, between text."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(tokens, 32, generator=generator)
    frame = torch.randn(grid.frame_size, 32, generator=generator)
    for number in range(grid.num_frames):
        frame = frame + 0.4 * torch.randn(grid.frame_size, 32, generator=generator)
        embeds[grid.start + number * grid.frame_size :][: grid.frame_size] = frame
    return embeds


@torch.inference_mode()
def shortened(vlm, embeds, rows):
    return vlm.model(inputs_embeds=embeds[rows][None], use_cache=False).logits


@torch.inference_mode()
def test_vidcom2_is_the_model_on_the_tokens_that_are_left():
    """Fresh positions: exactly the model on the shorter prompt, which the published code builds before the model."""
    vlm, embeds = family("qwen2", "sdpa"), video_embeds()
    vlm.grid = VIDEO
    x, frame = embeds[3:33], torch.arange(5).repeat_interleave(6)
    video, own = mean_similarities(x, frame)
    kept = outliers(video + own, [6] * 5, frame_counts(frame_shares(video, frame, 0.4), [6] * 5))
    with VidCom2(retention=0.4)(vlm) as prefill:
        logits = vlm.model(inputs_embeds=embeds[None], use_cache=False).logits
    assert prefill.last.left.tolist() == kept.tolist()
    assert 0 < len(kept) < 30
    rows = [0, 1, 2, *(3 + kept).tolist(), *range(33, 40)]
    torch.testing.assert_close(logits, shortened(vlm, embeds, rows), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_vidcom2_keeps_newlines():
    vlm, embeds = family("qwen2", "sdpa"), video_embeds()
    vlm.grid = VIDEO
    embeds[3:33].view(5, 2, 3, 32)[:, :, 2] = embeds[39]
    with VidCom2(retention=0.5)(vlm) as prefill:
        vlm.model(inputs_embeds=embeds[None], use_cache=False)
    left = prefill.last.left
    assert set(range(2, 30, 3)) <= set(left.tolist())
    assert len(left) < 30
    x = embeds[3:33].view(5, 2, 3, 32)[:, :, :2].reshape(20, 32)
    frame = torch.arange(5).repeat_interleave(4)
    video, own = mean_similarities(x, frame)
    kept = outliers(video + own, [4] * 5, frame_counts(frame_shares(video, frame, 0.5), [4] * 5))
    assert [number for number in left.tolist() if number % 3 < 2] == (kept // 2 * 3 + kept % 2).tolist()


@pytest.mark.parametrize("order", ["published", "place"])
@pytest.mark.parametrize("odd_last", ["published", "keep"])
@torch.inference_mode()
def test_dycoke_is_the_model_on_the_tokens_that_are_left(order, odd_last):
    vlm, embeds = family("qwen2", "sdpa"), video_embeds()
    vlm.grid = VIDEO
    kept = temporal_merge(embeds[3:33].view(5, 6, 32), 3, drop_odd_last=odd_last == "published")
    kept = [places if order == "published" else places.sort().values for places in kept]
    kept = torch.cat([6 * number + places for number, places in enumerate(kept)])
    with DyCoke(retention=0.5, order=order, odd_last=odd_last)(vlm) as prefill:
        logits = vlm.model(inputs_embeds=embeds[None], use_cache=False).logits
    assert prefill.last.left.tolist() == sorted(kept.tolist())
    rows = [0, 1, 2, *(3 + kept).tolist(), *range(33, 40)]
    torch.testing.assert_close(logits, shortened(vlm, embeds, rows), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_evs_keeps_what_changed_most():
    vlm, embeds = family("qwen2", "sdpa"), video_embeds()
    vlm.grid = VIDEO
    x = embeds[3:33].view(5, 6, 32).double()
    change = torch.ones(5, 6, dtype=torch.double) * 9
    for number in range(1, 5):
        for place in range(6):
            a, b = x[number, place], x[number - 1, place]
            change[number, place] = 1 - a @ b / (a.norm() * b.norm())
    for retention, count in ((0.5, 15), (0.1, 6), (1, 30)):
        with Evs(retention=retention)(vlm) as prefill:
            vlm.model(inputs_embeds=embeds[None], use_cache=False)
        order = sorted(range(30), key=lambda number: -float(change.flatten()[number]))
        assert prefill.last.left.tolist() == sorted(order[:count])


@dataclass(frozen=True)
class Looks(Method):
    """Compares what it is told before a layer with what then happens, and keeps given tokens."""

    name = "looks"
    seen: list = field(default_factory=list)

    def before_attention(self, prefill, layer, hidden):
        if layer == 1 and len(prefill.present) == GRID.length:
            prefill.renumber()
            return hidden, prefill.keep(torch.arange(0, GRID.length, 2))
        prefill.state["ahead"] = (*prefill.queries_and_keys(hidden), prefill.mask)
        return hidden, None

    def on_attention(self, prefill, layer, queries, keys, scaling):
        if layer != 1:
            *ahead, mask = prefill.state["ahead"]
            self.seen.append(torch.equal(ahead[0], queries) and torch.equal(ahead[1], keys) and ahead[2] == scaling)
            assert (mask is None) == (prefill.mask is None)
        return queries


@pytest.mark.parametrize(("name", "attention", "settings"), FAMILIES, ids=named)
@torch.inference_mode()
def test_what_a_layer_will_attend_with_is_known_before_it_runs(name, attention, settings):
    vlm, method = family(name, attention, **settings), Looks()
    with method(vlm):
        vlm.model.generate(**prompt(), max_new_tokens=2, do_sample=False)
    assert method.seen == [True, True]


@torch.inference_mode()
def test_fastv_and_pyramiddrop_rank_by_the_last_token(monkeypatch):
    """Their rankings against the model's own attention matrices (eager, output_attentions), stage by stage."""
    vlm = family("llama", "eager")
    matrices = vlm.model(**prompt(), use_cache=False, output_attentions=True).attentions
    rows = [matrix[0, :, -1, 4:28].mean(0) for matrix in matrices]
    with FastV(layer=2, retention=0.25)(vlm) as prefill:
        run(vlm)
    assert prefill.last.attended == [24, 24, 6]
    assert prefill.last.left.tolist() == rows[1].topk(6).indices.sort().values.tolist()
    with PyramidDrop(layers=(2,), retention=(0.25,))(vlm) as prefill:
        run(vlm)
    assert prefill.last.attended == [24, 24, 6]
    assert prefill.last.left.tolist() == rows[2].topk(6).indices.sort().values.tolist()
    torch.testing.assert_close(prefill.last.details["importance"], rows[2], rtol=0, atol=1e-6)


def test_look_ahead_is_for_before_a_layer():
    shape = Prefill(GRID, None, TOKENS, torch.device("cpu"), False)
    with pytest.raises(ValueError, match="no layer is about to run"):
        shape.queries_and_keys(torch.zeros(TOKENS, 32))


@pytest.mark.parametrize(
    "method",
    [FastV, Evs, VidCom2, PyramidDrop, DyCoke, FrameFusion, Random, Uniform, FewerFrames, FewerPixels],
    ids=lambda kind: kind.name,
)
@pytest.mark.parametrize("target", [0.5, 0.75])
@torch.inference_mode()
def test_a_target_sparsity_is_met(method, target):
    grid = VisualGrid(3, 16 * 16, 16, 4, 4, 16, 4)
    vlm = family("qwen2", "sdpa", num_hidden_layers=8)
    vlm.grid = grid
    embeds = video_embeds(tokens=grid.stop + 6, grid=grid)
    settings = {"layers": (1, 2, 4)} if method is PyramidDrop else {}
    with method(target_sparsity=target, **settings)(vlm) as prefill:
        vlm.model(inputs_embeds=embeds[None], use_cache=False)
    assert prefill.sparsity == pytest.approx(target, abs=0.015)
    if method is not FrameFusion:  # which also drops before an MLP
        assert prefill.sparsity == schedule_sparsity(prefill.last.shape, grid.length, prefill.last.attended)


@pytest.mark.parametrize("method", [FastV(layer=1, target_sparsity=0.9), DyCoke(target_sparsity=0.9)], ids=named)
@torch.inference_mode()
def test_a_target_out_of_reach_is_refused(method):
    vlm = family("qwen2", "sdpa")
    reason = f"{method.name}: target_sparsity 0.9 cannot be met by .*; within reach: 0.000"
    with pytest.raises(UserError, match=reason), method(vlm):
        run(vlm)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(layer=0), "fastv: layer is 0"),
        (lambda: FastV(layer=-1), "fastv: layer"),
        (lambda: FastV(retention=0), r"fastv: retention is 0; it must lie in \(0, 1\]"),
        (lambda: FastV(target_sparsity=1), "fastv: target_sparsity is 1"),
        (lambda: Evs(retention=1.5), "evs: retention is 1.5"),
        (lambda: Evs(target_sparsity=-0.1), "evs: target_sparsity is -0.1"),
        (lambda: VidCom2(retention=0), "vidcom2: retention is 0"),
        (lambda: VidCom2(target_sparsity=2), "vidcom2: target_sparsity is 2"),
        (lambda: PyramidDrop(layers=(2, 1), retention=(0.5, 0.2)), "pyramiddrop: layers .* must ascend"),
        (lambda: PyramidDrop(layers=(1,)), "pyramiddrop: layers has 1 entries and retention 3"),
        (lambda: PyramidDrop(layers=(1,), retention=(2,)), "pyramiddrop: retention is 2"),
        (lambda: PyramidDrop(positions="fresh"), "pyramiddrop: positions is 'fresh'; it must be published or original"),
        (lambda: DyCoke(positions="keep"), "dycoke: positions is 'keep'; it must be published or original"),
        (lambda: VidCom2(positions="keep"), "vidcom2: positions is 'keep'; it must be published or original"),
        (lambda: DyCoke(retention=-1), r"dycoke: retention is -1; it must lie in \[0, 1\]"),
        (lambda: DyCoke(order="time"), "dycoke: order is 'time'; it must be published or place"),
        (lambda: DyCoke(odd_last="drop"), "dycoke: odd_last is 'drop'; it must be published or keep"),
        (lambda: Random(seed=-1), "random: seed is -1"),
        (lambda: Uniform(retention=0), "uniform: retention is 0"),
    ],
)  # fmt: skip
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=f"method {message}"):
        make()


@pytest.mark.parametrize("method", [FastV(layer=3), PyramidDrop(layers=(1, 5), retention=(0.5, 0.2))], ids=named)
@torch.inference_mode()
def test_layers_that_do_not_exist_are_refused(method):
    vlm = family("qwen2", "sdpa")
    with pytest.raises(UserError, match=f"{method.name}: layer .* does not exist; the model has 3"), method(vlm):
        run(vlm)


@pytest.mark.parametrize("method", [Evs(), DyCoke(), FewerFrames()], ids=named)
@torch.inference_mode()
def test_methods_that_compare_frames_need_a_video(method):
    vlm = family("qwen2", "sdpa")
    vlm.grid = VisualGrid(4, 24, 1, 4, 6, 24, 6)
    with pytest.raises(UserError, match=f"method {method.name}: the input has one frame"), method(vlm):
        run(vlm)


@torch.inference_mode()
def test_random_draws_anew_for_another_clip_and_never_for_the_same():
    vlm = family("qwen2", "sdpa")
    other = {"input_ids": prompt()["input_ids"].flip(1)}
    chosen = []
    for inputs, seed in ((prompt(), 0), (prompt(), 0), (other, 0), (prompt(), 1)):
        with Random(seed=seed)(vlm) as prefill:
            run(vlm, inputs)
        chosen.append(prefill.last.left.tolist())
        assert len(chosen[-1]) == 6
    assert chosen[0] == chosen[1] and chosen[0] != chosen[2] and chosen[0] != chosen[3]


@torch.inference_mode()
def test_fewer_frames_is_the_model_on_those_frames():
    vlm, embeds = family("qwen2", "sdpa"), video_embeds()
    vlm.grid = VIDEO
    with FewerFrames(retention=0.4)(vlm) as prefill:
        logits = vlm.model(inputs_embeds=embeds[None], use_cache=False).logits
    left = prefill.last.left.tolist()
    assert left == [*range(6, 12), *range(18, 24)]
    rows = [0, 1, 2, *(3 + number for number in left), *range(33, 40)]
    torch.testing.assert_close(logits, shortened(vlm, embeds, rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", range(1, 31))
@torch.inference_mode()
def test_fewer_frames_keeps_as_many_tokens_as_asked(keep):
    vlm, embeds = family("qwen2", "sdpa"), video_embeds()
    vlm.grid = VIDEO
    with FewerFrames(retention=(keep + 0.5) / 30 if keep < 30 else 1)(vlm) as prefill:
        vlm.model(inputs_embeds=embeds[None], use_cache=False)
    frames = (prefill.last.left // 6).unique(return_counts=True)[1]
    assert int(frames.sum()) == keep
    assert int((frames < 6).sum()) <= 1


@torch.inference_mode()
def test_fewer_pixels_is_the_model_on_block_means():
    """Frames of 4 × 6 tokens at a quarter: 2 × 3 means of blocks of 2 × 2, written out; with newlines, beside them."""
    vlm = family("qwen2", "sdpa")
    for newline in (0, 1):
        columns = 6 + newline
        vlm.grid = grid = VisualGrid(3, 2 * 4 * columns, 2, 4, columns, 4 * columns, columns)
        embeds = video_embeds(tokens=grid.stop + 5, grid=grid)
        video = embeds[3 : grid.stop].view(2, 4, columns, 32)
        video[:, :, 6:] = embeds[-1]
        short = [*embeds[:3]]
        for frame in range(2):
            for row in (0, 2):
                for column in (0, 2, 4):
                    short.append(video[frame, row : row + 2, column : column + 2].reshape(4, 32).mean(0))
                short += [embeds[-1]] * newline
        short = torch.stack([*short, *embeds[-5:]])
        keep = 2 * 2 * (3 + newline)
        with FewerPixels(retention=keep / grid.length)(vlm) as prefill:
            logits = vlm.model(inputs_embeds=embeds[None], use_cache=False).logits
        assert len(prefill.last.left) == keep
        expected = vlm.model(inputs_embeds=short[None], use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_fewer_pixels_needs_rows_of_tokens():
    vlm = family("qwen2", "sdpa")
    vlm.grid = VisualGrid(3, 30, 5, 2, 4, 6, 4)
    with pytest.raises(UserError, match="fewer_pixels: the frames here are no whole rows"), FewerPixels()(vlm):
        run(vlm)
