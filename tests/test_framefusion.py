"""FrameFusion against vectors of the published implementation, an oracle, and its budget on a whole decoder."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2Model

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels.temporal import frame_before, temporal_similarity
from focuslib.methods import FrameFusion
from focuslib.methods.base import Prefill
from focuslib.methods.budget import schedule_sparsity
from focuslib.methods.framefusion import budget_ratio, run_means, run_starts
from focuslib.prefill.ops import DecoderShape


def video(frames, height=4, width=5, start=4):
    size = height * width
    return VisualGrid(start, frames * size, frames, height, width, size, width)


def shape(layers, heads=2, head_dim=16):
    return DecoderShape(layers, heads * head_dim, 64, heads, heads, head_dim)


@pytest.mark.parametrize("case", ["mid", "prune", "topk"])
def test_equals_published_vectors(golden, case):
    data, meta = golden(f"framefusion_{case}")
    method = FrameFusion(meta["cost"], meta["similarity_lower_bound"], meta["ratio_lower_bound"])
    hidden = torch.from_numpy(data["input"])
    run = Prefill(video(meta["frames"]), shape(meta["num_layers"]), len(hidden), hidden.device, False)
    method.begin(run, hidden)
    progress = run.state["progress"]
    for step, (*before, merging_done, pruning_done, shares) in enumerate(meta["states"]):
        assert [progress.merging_done, progress.pruning_done] == before
        # keys that are the axes of the token space turn the logarithm of an attention row into exactly that row
        row = torch.from_numpy(data[f"attn_last_{step}"])
        queries = row.log()[:, None].expand(-1, len(hidden), -1)
        keys = torch.eye(len(hidden)).expand(len(row), -1, -1)
        assert method.on_attention(run, step - 1, queries, keys, scaling=1.0) is queries
        event = method.before_attention if step == 0 else method.after_attention
        hidden, rows = event(run, max(step - 1, 0), hidden)
        run.drop(max(step - 1, 0), rows)
        hidden = hidden[rows]
        assert run.kept.tolist() == data[f"kept_{step}"].tolist()
        torch.testing.assert_close(hidden, torch.from_numpy(data[f"hidden_{step}"]), rtol=0, atol=1e-5)
        after = [progress.merging_done, progress.pruning_done, len(progress.shares)]
        assert after == [merging_done, pruning_done, shares]
        hidden = hidden + torch.from_numpy(data[f"drift_{step}"]) if f"drift_{step}" in data else hidden
    assert progress.shares == pytest.approx(meta["sparsity_list"])
    if progress.pruning_done:
        assert method.after_attention(run, 5, hidden)[1] is None
    method.end(run)
    assert run.record.stats["kept"] == len(run.present) / run.grid.length
    assert method.table_two_sparsity(run.record) == 1 - meta["cost"]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(2, 5),
    size=st.integers(1, 6),
    share=st.floats(0.2, 1),
    bound=st.floats(-1, 1),
)
def test_runs_equal_oracle(seed, frames, size, share, bound):
    """Runs written position by position: a token joins its predecessor's run if they are alike."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.nonzero(torch.rand(frames * size, generator=generator) < share).squeeze(1)
    x = torch.randn(len(positions), 4, generator=generator)
    before = frame_before(positions % size)
    similarity = temporal_similarity(x, before)
    merged = similarity >= bound
    first = run_starts(before, merged)
    means = run_means(x, first)
    for place in range(size):
        rows = [row for row, position in enumerate(positions.tolist()) if position % size == place]
        runs = []
        for number, row in enumerate(rows):
            if number == 0:
                assert not merged[row] and similarity[row] == -torch.inf
            else:
                cosine = torch.cosine_similarity(x[row], x[rows[number - 1]], dim=0)
                torch.testing.assert_close(similarity[row], cosine, rtol=0, atol=1e-6)
            if merged[row]:
                runs[-1].append(row)
            else:
                runs.append([row])
        for members in runs:
            assert (first[members] == members[0]).all()
            torch.testing.assert_close(means[members], x[members].mean(0).expand(len(members), -1))


def test_merge_roots_follow_later_merges():
    """Frames 0 and 1 merge in the first call, the result and frame 2 in the second."""
    grid = video(3, 1, 2, start=0)
    method = FrameFusion(cost=1.0, similarity_lower_bound=0.9, ratio_lower_bound=0.0)
    run = Prefill(grid, shape(4), grid.length, torch.device("cpu"), False)
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1]])
    method.begin(run, x)
    x, _ = method._merge(run, x, ratio=1.0)
    rows = torch.tensor([0, 1, 3, 4, 5])
    assert run.state["progress"].root.tolist() == [0, 1, 0, 3, 4, 5]
    run.drop(0, rows)
    x = x[rows]
    x[3] = torch.tensor([1.0, 0])
    method._merge(run, x, ratio=1.0)
    assert run.state["progress"].root.tolist() == [0, 1, 0, 3, 0, 5]


def test_budget_ratio():
    assert budget_ratio([], 28, 0.3) == pytest.approx(0.7)
    # two layers at 40 % leave 0.3·10 − 0.8 = 2.2 for eight layers that would take 3.2
    assert budget_ratio([0.6, 0.0], 10, 0.3) == pytest.approx(1 - 2.2 / 3.2)
    assert budget_ratio([0.9], 10, 0.3) == 0.0
    assert budget_ratio([0.5, 0.5], 2, 0.5) == 0.0
    with pytest.raises(UserError, match=r"framefusion: cost 0.3 cannot be met: 2 of 4 layers cost 0.427 while merging"):
        budget_ratio([0.1, 0.1], 4, 0.3)


@pytest.mark.parametrize(("drift", "cost"), [(0.5, 0.3), (2.0, 0.5), (0.05, 0.3)])
def test_meets_its_budget_on_a_decoder(drift, cost):
    """The visual tokens that the layers see, summed, are the cost's share of the dense ones."""
    torch.manual_seed(0)
    layers, grid = 12, video(6, 5, 5, start=3)
    config = Qwen2Config(
        vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = Qwen2Model(config).eval()
    still = torch.randn(1, 25, 32)
    embeds = torch.cat([torch.randn(3, 32), (still + drift * torch.randn(6, 25, 32)).flatten(0, 1), torch.randn(4, 32)])
    vlm = SimpleNamespace(model=model, grid=grid)
    seen = []
    for layer in model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1] - 7))
    with torch.inference_mode():
        dense = model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
        assert seen == layers * [grid.length]
        seen.clear()
        with FrameFusion(cost=cost)(vlm) as run:
            out = model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
        assert sum(seen) / grid.length == pytest.approx(layers * cost, abs=layers / grid.length)
        assert torch.equal(model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state, dense)
    assert out.shape[1] == 7 + run.last.retained[-1]
    assert run.method.table_two_sparsity(run.last) == pytest.approx(1 - cost)


def on_a_decoder(method, drift, layers, seed=0):
    """The record of a prefill of 8 × 36 tokens that drift from frame to frame."""
    torch.manual_seed(seed)
    grid = video(8, 6, 6, start=3)
    config = Qwen2Config(
        vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    still = torch.randn(1, 36, 32)
    frames = (still + drift * torch.randn(8, 36, 32)).flatten(0, 1)
    embeds = torch.cat([torch.randn(3, 32), frames, torch.randn(4, 32)])
    vlm = SimpleNamespace(model=Qwen2Model(config).eval(), grid=grid)
    with torch.inference_mode(), method(vlm) as run:
        vlm.model(inputs_embeds=embeds[None], use_cache=False)
    return run.last


@settings(max_examples=30, deadline=None)
@given(
    drift=st.floats(0.01, 3), layers=st.integers(6, 16), target=st.floats(0.2, 0.8), seed=st.integers(0, 99),
    bound=st.sampled_from([0.01, 0.1, 0.5]), similarity=st.sampled_from([0.3, 0.6, 0.9]),
)  # fmt: skip
def test_meets_a_target_whatever_the_clip_merges(drift, layers, target, seed, bound, similarity):
    """Counted, not estimated: to a token more or less in every layer."""
    method = FrameFusion(similarity_lower_bound=similarity, ratio_lower_bound=bound, target_sparsity=target)
    record = on_a_decoder(method, drift, layers, seed)
    one_token = schedule_sparsity(record.shape, 288, [287] * layers)
    assert abs(record.computation_sparsity - target) <= one_token
    assert method.table_two_sparsity(record) == 1 - sum(record.attended) / (288 * layers)


def test_a_target_out_of_reach_is_said():
    """Six layers, of which the first attends in full: the others cannot save so much."""
    method = FrameFusion(similarity_lower_bound=1, target_sparsity=0.95)
    with pytest.raises(UserError, match=r"framefusion: target_sparsity 0\.95 cannot be met by pruning after"):
        on_a_decoder(method, drift=3.0, layers=6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 1}, "target_sparsity is 1"),
        ({"cost": 0}, "cost is 0"),
        ({"cost": 1.2}, "cost is 1.2"),
        ({"similarity_lower_bound": 1.5}, "similarity_lower_bound is 1.5"),
        ({"ratio_lower_bound": -0.1}, "ratio_lower_bound is -0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=f"framefusion: {message}"):
        FrameFusion(**settings)


def test_needs_a_video():
    run = Prefill(video(1), shape(4), 30, torch.device("cpu"), False)
    with pytest.raises(UserError, match="framefusion: the input has one frame"):
        FrameFusion().begin(run, torch.zeros(30, 32))
