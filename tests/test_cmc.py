"""CMC against vectors of the published implementation, and its search against the exhaustive one."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import needs_compiler

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels import motion
from focuslib.kernels.compiled import at_once
from focuslib.kernels.motion import (
    INFORMATIVE,
    ZEROED,
    Compensation,
    compensate,
    frame_matches,
    motion_search,
    replaced_shares,
    same_position,
)
from focuslib.methods import Cmc
from focuslib.methods.base import Prefill
from focuslib.prefill.ops import DecoderShape, cmc_operations, dense_operations

SHAPE = DecoderShape(layers=1, hidden=48, mlp=96, heads=3, kv_heads=3, head_dim=16)


@pytest.fixture(autouse=True, scope="module")
def elimination():
    """Search by elimination however small the case."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_FEW", "_SMALL", "_NARROW", "_TRIMMED"):
            patch.setattr(motion, name, 0)
        yield


def video(frames, height=3, width=4, start=4):
    size = height * width
    return VisualGrid(start, frames * size, frames, height, width, size, width)


def prefill(grid, length):
    return Prefill(grid, SHAPE, length, torch.device("cpu"), keep_codes=False)


def exhaustive(tokens, reference, limit):
    distance = torch.cdist(tokens, reference, p=1)
    best = distance.argmin(1)
    return torch.where(distance.gather(1, best[:, None]).squeeze(1) < limit, best, INFORMATIVE)


@pytest.mark.parametrize("case", ["f16", "f13", "f10"])
def test_equals_published_vectors(golden, case):
    arrays, meta = golden(f"cmc_{case}")
    data = {name: torch.from_numpy(value) for name, value in arrays.items()}
    grid = video(meta["frames"])
    method = Cmc(meta["threshold"], meta["threshold_query"], meta["threshold_score"])
    run = prefill(grid, len(data["embeds"]))
    method.begin(run, data["embeds"])
    assert torch.equal(method.at_site(run, 0, "q_proj", data["linear_in"]), data["linear_out"])
    assert torch.equal(method.on_attention(run, 0, data["query_in"], data["query_in"], 1.0), data["query_out"])
    assert method.wants_probabilities(run, 0)
    for head, (before, after) in enumerate(zip(data["attn_in"], data["attn_out"], strict=True)):
        assert torch.equal(method.on_probabilities(run, 0, head, before.clone()), after)
    method.end(run)
    stats = run.record.stats
    measured = [stats[name] for name in ("linear_sparsity", "query_sparsity", "attn_score_sparsity")]
    assert measured == pytest.approx(data["sparsity"].tolist(), abs=1e-6)
    assert run.record.details["query_sparsity"].mean().item() == pytest.approx(measured[1])
    expected = 1 - cmc_operations(SHAPE, grid.length, *measured) / dense_operations(SHAPE, grid.length)
    assert method.table_two_sparsity(run.record) == expected


def test_inputs_are_left_alone(golden):
    data, meta = golden("cmc_f10")
    queries = torch.from_numpy(data["query_in"])
    method, run = Cmc(), prefill(video(meta["frames"]), queries.shape[1])
    method.begin(run, torch.from_numpy(data["embeds"]))
    before = queries.clone()
    method.on_attention(run, 0, queries, queries, 1.0)
    method.at_site(run, 0, "o_proj", queries[0])
    assert torch.equal(queries, before)


@st.composite
def searches(draw):
    """Tokens and references of few values, so that ties, equal tokens and zero ends are frequent; exact in float32."""
    seed = draw(st.integers(0, 2**32 - 1))
    tokens, references = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    channels = draw(st.integers(1, 300))
    values, zero_end = draw(st.integers(1, 5)), draw(st.integers(0, channels))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-values, values + 1, (tokens + references, channels), generator=generator).float()
    alike = draw(st.floats(0, 1))  # share of channels all tokens have in common
    x = torch.where(torch.rand(channels, generator=generator) < alike, x[0], x)
    x[:, channels - zero_end :] = 0
    limit = draw(st.floats(0, 1.2)) * torch.cdist(x, x, p=1).max().item()
    budget, few = draw(st.sampled_from([1, 1 << 12, 1 << 20])), draw(st.sampled_from([0, 0, 1 << 24]))
    return x[:tokens], x[tokens:], limit, budget, few


@settings(max_examples=200, deadline=None)
@given(searches())
def test_search_equals_exhaustive_search(case):
    tokens, reference, limit, budget, few = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(motion._CHUNK_BYTES, "cpu", budget)
        patch.setattr(motion, "_FEW", few)
        assert torch.equal(motion_search(tokens, reference, limit), exhaustive(tokens, reference, limit))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 700),
    spread=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    share=st.floats(0.2, 1.5),
)
def test_search_equals_exhaustive_search_on_attention_rows(seed, channels, spread, share):
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(60, channels, generator=generator)
    scores[20:] = scores[:20].repeat(2, 1) + 0.1 * scores[20:]
    seen = torch.randint(1, channels + 1, (60, 1), generator=generator)
    rows = scores.masked_fill(torch.arange(channels) >= seen, -torch.inf).softmax(-1)
    limit = share * torch.cdist(rows[20:], rows[:20], p=1).amin(1).median().item()
    assert torch.equal(motion_search(rows[20:], rows[:20], limit), exhaustive(rows[20:], rows[:20], limit))


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(
    case=searches(),
    scale=st.sampled_from([1.0, 0.1]),
    sizes=st.sampled_from([{"_NARROW": 1 << 20}, {"_SMALL": 1 << 24}, {"_SMALL": 1 << 24, "_TRIMMED": 1 << 24}, {}]),
)
def test_compiled_search_equals_exhaustive_search(case, scale, sizes):
    """Also where distances are added in another order: ties, near ties, distances at the limit."""
    tokens, reference, limit, budget, _ = case
    tokens, reference, limit = tokens * scale, reference * scale, limit * scale
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), at_once():
        warnings.filterwarnings("error", "torch cannot compile")
        patch.setitem(motion._CHUNK_BYTES, "cpu", budget)
        for name, size in sizes.items():
            patch.setattr(motion, name, size)
        assert torch.equal(motion_search(tokens, reference, limit), exhaustive(tokens, reference, limit))


@needs_compiler
def test_odd_values_match_alike_compiled_or_not():
    tokens, reference = torch.randn(2, 80, 1280, generator=torch.Generator().manual_seed(0))
    tokens[:, 600:] = reference[:, 600:] = 0
    tokens[3] = reference[5]
    tokens[3, 900] = torch.nan
    tokens[4] = reference[6]
    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(motion, "_SMALL", 1 << 24)
        match = motion_search(tokens, reference, 50.0)
        assert match[3] == INFORMATIVE and match[4] == 6
        assert (motion_search(tokens[:3, :4], reference[:3, :4], 1e39) >= 0).all()
    assert motion_search(tokens[:3], reference[:0], 50.0).tolist() == [INFORMATIVE] * 3


@pytest.mark.parametrize("simplified", [False, True])
def test_heads_are_searched_and_compensated_each_by_itself(simplified):
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 1, 6, 20, generator=generator) + 0.1 * torch.randn(3, 11, 6, 20, generator=generator)
    heads = heads.flatten(1, 2)  # [3, 66, 20]; the last interval has no I-frame
    heads[:, -4:] *= 1e-3
    options = {"threshold": 0.12, "search": same_position if simplified else motion_search}
    match = frame_matches(heads, 6, **options)
    rows = torch.arange(2, 68)
    x = torch.randn(3, 70, 5, generator=generator)
    found, before = Compensation(match, rows, 70)(x), x.clone()
    assert torch.equal(x, before)
    for head, own, alone in zip(heads, match, x, strict=True):
        assert torch.equal(frame_matches(head, 6, **options), own)
        compensate(alone[2:68], own)
    assert torch.equal(found, x) and (match == ZEROED).any() and (match >= 0).any()
    assert replaced_shares(match, 6) == [replaced_shares(own[None], 6)[0] for own in match]


@settings(max_examples=60, deadline=None)
@given(searches())
def test_bounds_never_exceed_distances(case):
    tokens, reference, *_ = case
    tokens, reference = tokens * 0.1, reference * 0.1  # rounded sums
    a, b = motion._block_sums(tokens), motion._block_sums(reference)
    every = torch.arange(len(tokens))
    for size in (8, 64):
        bound = motion._lower_bounds(a, every, b, max(a.used, b.used), size, tokens.shape[1])
        assert (bound <= torch.cdist(tokens, reference, p=1)).all()


@pytest.mark.parametrize("channels", [5, 8, 64, 200, 1000])
def test_search_at_the_limit(channels):
    """Distances that the bounds meet exactly, rows that end in zeros next to rows that do not."""
    tokens, reference = torch.zeros(3, channels), torch.ones(2, channels)
    reference[1, channels // 2 :] = -1
    for x, y in ((tokens, reference), (reference, tokens)):
        assert (motion_search(x, y, channels) == INFORMATIVE).all()
        assert (motion_search(x, y, channels * 1.001) == 0).all()


def test_half_precision_is_searched_in_float32():
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        found = motion_search(x[10:].to(dtype), x[:10].to(dtype), 70.0)
        assert torch.equal(found, exhaustive(x[10:].to(dtype).float(), x[:10].to(dtype).float(), 70.0))


def test_i_frame_tokens_match_the_first_equal_one_and_do_not_count():
    """Newline tokens are equal in the embeddings and differ later: all take the first one's place."""
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    x[:, [2, 5]] = 7.0
    match = frame_matches(x.flatten(0, 1), 6, threshold=1e-6)
    assert match[18:].tolist() == [18, 19, 20, 21, 22, 20]
    assert match[:18].tolist() == 3 * [-1, -1, 20, -1, -1, 20]
    assert replaced_shares(match[None], 6) == [6 / 24]
    later = torch.arange(24.0)[:, None].clone()
    compensate(later, match)
    assert later[[2, 5, 20, 23], 0].tolist() == [20, 20, 20, 20]


def test_interval_without_i_frame_is_informative():
    x = torch.ones(3 * 4 + 8 * 4, 5)
    match = frame_matches(x, 4, threshold=1.0)
    assert (match[:32] == 12).all() and (match[32:] == INFORMATIVE).all()
    match = frame_matches(x, 4, threshold=1.0, interval=2, i_frame=1)
    assert (match[-4:] == INFORMATIVE).all() and (match[:-4] >= 0).all()


def test_simplified_search_compares_the_same_position():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 12, generator=generator)
    tokens = torch.cat([reference + 0.01, reference.roll(1, 0), reference])
    found = same_position(tokens, reference, 1.0)
    assert found.tolist() == [0, 1, 2, 3, 4] + 5 * [-1] + [0, 1, 2, 3, 4]
    full = motion_search(tokens, reference, 1.0)
    assert full[5:10].tolist() == [4, 0, 1, 2, 3]


def test_skipped_layers_form_no_attention_matrix():
    run = prefill(video(4), 60)
    assert not Cmc().wants_probabilities(run, 27) and Cmc().wants_probabilities(run, 26)
    assert Cmc(skip_score_layers=[]).wants_probabilities(run, 27)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linear_threshold": -0.1}, "linear_threshold is -0.1"),
        ({"query_threshold": float("nan")}, "query_threshold is nan"),
        ({"score_threshold": -1}, "score_threshold is -1"),
        ({"interval": 0}, "interval is 0"),
        ({"i_frame": 8}, "i_frame is 8"),
        ({"skip_score_layers": (-1,)}, "skip_score_layers"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=f"cmc: {message}"):
        Cmc(**settings)


def test_needs_whole_frames():
    embeds = torch.zeros(100, 48)
    with pytest.raises(UserError, match="cmc: the input has one frame"):
        Cmc().begin(prefill(video(1), 100), embeds)
    with pytest.raises(UserError, match="cmc: 31 visual tokens are not 2 equal frames"):
        Cmc().begin(prefill(VisualGrid(4, 31, 2, 3, 4, 12, 4), 100), embeds)


def test_frames_are_the_runs_equal_parts_whatever_the_frame_stride():
    """The published grid of MiniCPM-V has a frame stride of 199 also where a frame has 67 tokens."""
    embeds = torch.zeros(100, 48)
    running = prefill(VisualGrid(4, 4 * 15, 4, 3, 4, 40, 4), 100)
    Cmc().begin(running, embeds)
    assert running.state["linear"].tolist()[:15] == [45] * 15  # the first token of frame 3
