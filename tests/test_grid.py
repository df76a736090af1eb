"""The grids: runs with text between them, and tokens with coordinates; what methods make of both."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import family

from focuslib.errors import InputError
from focuslib.grid import CoordinateGrid, VisualGrid, grid_from_dict
from focuslib.kernels.similarity import concentrate
from focuslib.methods import Adaptiv, Cmc, Dense, Focus, FrameFusion
from focuslib.methods.adaptiv import KEPT, merge_directions
from focuslib.prefill.trace import Trace

# Two frames of 3 × 4 with a timestamp of growing length before each, then a question.
RUNS = VisualGrid(4, 24, 2, 3, 4, 12, 4, runs=((4, 12), (19, 12)))
TOKENS = 40
ONE_RUN = VisualGrid(4, 24, 2, 3, 4, 12, 4)


def coordinates(*media: tuple[int, int, int]) -> tuple:
    """Of media of (frames, height, width)."""
    return tuple(
        (medium, frame, row, column)
        for medium, (frames, height, width) in enumerate(media)
        for frame in range(frames)
        for row in range(height)
        for column in range(width)
    )


# A video of three frames, an image, another video.
MEDIA = ((3, 2, 3), (1, 4, 4), (2, 2, 2))
MIXED = CoordinateGrid(((3, 18), (25, 16), (43, 8)), coordinates(*MEDIA))
PARTS = [slice(0, 18), slice(18, 34), slice(34, 42)]


@dataclass(frozen=True)
class Watch(Dense):
    """Notes the rows of the sequence that are left after each layer."""

    inside: Focus = field(default_factory=Focus)
    left: list = field(default_factory=list)
    name: ClassVar[str] = "watch"

    def begin(self, prefill, embeds):
        self.inside.begin(prefill, embeds)

    def on_attention(self, prefill, layer, queries, keys, scaling):
        return self.inside.on_attention(prefill, layer, queries, keys, scaling)

    def after_attention(self, prefill, layer, hidden):
        return self.inside.after_attention(prefill, layer, hidden)

    def end(self, prefill):
        self.left.append(prefill.kept)


def test_a_single_run_is_the_grid_of_always():
    assert VisualGrid(4, 24, 2, 3, 4, 12, 4, runs=((4, 24),)) == ONE_RUN
    assert replace(ONE_RUN, start=9).rows().tolist() == list(range(9, 33))
    assert "runs" not in ONE_RUN.to_dict()
    for grid in (ONE_RUN, RUNS, MIXED):
        assert grid_from_dict(grid.to_dict()) == grid


def test_rows_skip_the_text_between_runs():
    assert RUNS.rows().tolist() == [*range(4, 16), *range(19, 31)]
    assert (RUNS.start, RUNS.stop, MIXED.start, MIXED.stop) == (4, 31, 3, 51)
    assert MIXED.medium_of().tolist() == [0] * 18 + [1] * 16 + [2] * 8
    assert MIXED.media == ((6, 6, 6), (16,), (4, 4))


@pytest.mark.parametrize(
    "runs", [((5, 12), (19, 12)), ((4, 12), (15, 12)), ((4, 12), (19, 11)), ((19, 12), (4, 12)), ((4, 0), (4, 24))]
)
def test_impossible_runs_are_refused(runs):
    with pytest.raises(ValueError, match="VisualGrid"):
        VisualGrid(4, 24, 2, 3, 4, 12, 4, runs=runs)


@pytest.mark.parametrize("places", [((0, 0, 0, 0),) * 2, ((0, 1, 0, 0), (0, 0, 0, 0)), ((0, 0, 0), (0, 0, 1))])
def test_impossible_coordinates_are_refused(places):
    with pytest.raises(ValueError, match=r"CoordinateGrid\.coordinates"):
        CoordinateGrid(((0, 2),), places)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_neighbours_are_those_of_the_coordinates(data):
    """Any subset of the tokens of any media: each candidate by its definition."""
    media = data.draw(st.lists(st.tuples(*(st.integers(1, 3),) * 3), min_size=1, max_size=3))
    everything = coordinates(*media)
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    places = tuple(sorted(chosen))
    grid = CoordinateGrid(((7, len(places)),), places)
    frames, side = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    found = grid.candidates(torch.arange(len(places)), frames, side)
    offsets = grid.block_places(frames, side)
    assert found.shape == (len(offsets), len(places))
    for row, (df, dh, dw) in zip(found.tolist(), offsets, strict=True):
        for (medium, frame, up, across), number in zip(places, row, strict=True):
            wanted = (medium, frame - df, up - dh, across - dw)
            assert (places[number] if number >= 0 else None) == (wanted if wanted in places else None)


def test_media_are_concentrated_each_for_itself():
    x = torch.randn(MIXED.length, 24, generator=torch.Generator().manual_seed(0)).round()
    x[20:] = x[:22].clone()  # tokens alike in different media
    options = {"threshold": 0.5, "vector_size": 4, "m_tile": -1, "max_doublings": 9, "frame_block": 3, "block": 3}
    whole = concentrate(x, torch.arange(MIXED.length), MIXED, **options)
    for part, shape in zip(PARTS, MEDIA, strict=True):
        alone = CoordinateGrid(((0, part.stop - part.start),), coordinates(shape))
        own = concentrate(x[part], torch.arange(alone.length), alone, **options)
        torch.testing.assert_close(whole.values[part], own.values, rtol=0, atol=0)


def test_merges_stay_within_a_medium():
    x = torch.ones(MIXED.length, 8)
    direction = merge_directions(x, MIXED, 0.5)
    for part, (frames, height, width) in zip(PARTS, MEDIA, strict=True):
        inside = torch.zeros(frames, height, width, dtype=torch.bool)
        inside[1 if frames > 1 else 0 :, 1:, 1:] = True
        assert ((direction[part] != KEPT) == inside.flatten()).all()


def regular(frames: int, height: int, width: int, start: int = 0) -> tuple[VisualGrid, CoordinateGrid]:
    """One video in both forms."""
    size = height * width
    strided = VisualGrid(start, frames * size, frames, height, width, size, width)
    return strided, CoordinateGrid(((start, frames * size),), coordinates((frames, height, width)))


@pytest.mark.parametrize(
    "method", [Adaptiv(0.1), Cmc(0.9, 9.0, 0.01, interval=2, i_frame=1), FrameFusion(0.7, 0.05, 0.3)]
)
def test_both_forms_of_a_video_give_the_same(method):
    outputs = []
    vlm = family("qwen2", "sdpa")
    for grid in regular(4, 2, 3, start=4):
        vlm.grid = grid
        embeds = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(1))
        with method(vlm) as run, torch.inference_mode():
            outputs.append(vlm.model(inputs_embeds=embeds, use_cache=False).logits)
        outputs.append(run.sparsity)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=0)
    assert outputs[1] == outputs[3] > 0


@pytest.mark.parametrize("grid", [RUNS, MIXED], ids=["runs", "media"])
def test_text_between_the_runs_stays(grid):
    vlm = family("qwen2", "sdpa")
    vlm.grid = grid
    tokens = grid.stop + 9
    embeds = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
    watch = Watch(Focus(selected_layers=(0, 2), retention=(0.5, 0.1), vector_size=8))
    with watch(vlm) as run, torch.inference_mode():
        logits = vlm.model(inputs_embeds=embeds, use_cache=False).logits
    text = sorted(set(range(tokens)) - set(grid.rows().tolist()))
    left = watch.left[0].tolist()
    assert [row for row in left if row in text] == text
    assert logits.shape[1] == len(left) == len(text) + int(grid.length * 0.1)
    assert [grid.rows()[number] for number in run.last.left] == [row for row in left if row not in text]


@pytest.mark.parametrize("grid", [RUNS, MIXED], ids=["runs", "media"])
@pytest.mark.parametrize("name", ["focus", "framefusion", "adaptiv", "cmc"])
def test_decoding_equals_recomputation_on_every_grid(grid, name):
    method = {
        "focus": Focus(selected_layers=(0, 2), retention=(0.5, 0.1), vector_size=8, similarity_threshold=0.3),
        "framefusion": FrameFusion(0.7, 0.1, 0.3),
        "adaptiv": Adaptiv(0.1),
        "cmc": Cmc(0.9, 9.0, 0.01, interval=2, i_frame=1),
    }[name]
    vlm = family("qwen2", "sdpa")
    vlm.grid = grid
    inputs = torch.randint(1, 90, (1, grid.stop + 9), generator=torch.Generator().manual_seed(2))
    with method(vlm) as run, torch.inference_mode():
        cached = vlm.model.generate(inputs, max_new_tokens=6, do_sample=False, output_logits=True,
                                    return_dict_in_generate=True)  # fmt: skip
        first = run.prefills[0]
        logits = vlm.model(input_ids=inputs).logits[0, -1]
    torch.testing.assert_close(cached.logits[0][0], logits, rtol=0, atol=2e-5)
    assert first.computation_sparsity > 0 or name == "cmc"


def test_dropping_text_is_an_error():
    vlm = family("qwen2", "sdpa")
    vlm.grid = RUNS

    @dataclass(frozen=True)
    class Careless(Dense):
        def before_attention(self, prefill, layer, hidden):
            return hidden, torch.arange(20, len(hidden)) if layer == 1 else None

    with Careless()(vlm), pytest.raises(ValueError, match="rows of text"):
        vlm.model(inputs_embeds=torch.zeros(1, TOKENS, 32))


def test_methods_of_frames_refuse_images_alone():
    picture = CoordinateGrid(((4, 16),), coordinates((1, 4, 4)))
    vlm = family("qwen2", "sdpa")
    vlm.grid = picture
    for method in (Cmc(), FrameFusion()):
        with method(vlm), pytest.raises(InputError, match="one frame"):
            vlm.model(inputs_embeds=torch.zeros(1, TOKENS, 32))


def test_unequal_frames_have_no_simplified_search():
    unequal = CoordinateGrid(((4, 5),), ((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 1)))
    vlm = family("qwen2", "sdpa")
    vlm.grid = unequal
    with Cmc(simplified=True)(vlm), pytest.raises(InputError, match="differ in size"):
        vlm.model(inputs_embeds=torch.zeros(1, TOKENS, 32))
    with Cmc(9.0, 9.0, 9.0, interval=2, i_frame=0)(vlm) as run, torch.inference_mode():
        vlm.model(inputs_embeds=torch.randn(1, TOKENS, 32))
    assert run.last.stats["linear_sparsity"] == 2 / 5


@pytest.mark.parametrize("grid", [RUNS, MIXED], ids=["runs", "media"])
def test_traces_keep_their_grid(grid, tmp_path):
    vlm = family("qwen2", "sdpa")
    vlm.grid = grid
    embeds = torch.randn(1, grid.stop + 5, 32, generator=torch.Generator().manual_seed(3))
    method = Focus(selected_layers=(1,), retention=(0.5,), vector_size=8, similarity_threshold=0.2)
    with method(vlm, trace=True) as run, torch.inference_mode():
        vlm.model(inputs_embeds=embeds)
    run.trace.save(tmp_path / "a.trace")
    again = Trace.load(tmp_path / "a.trace")
    assert again.grid == grid
    vectors = again.codes["q_proj"][0].shape[1]
    root = again.group_index("q_proj", 0).long() // vectors
    medium = grid.medium_of()
    assert (medium[root] == medium[:, None]).all()
    assert (root != torch.arange(grid.length)[:, None]).any()
