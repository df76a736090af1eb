"""Today's families by the generic adapter: real processors, tiny random models; exact, and rightly concentrated."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import CHECKPOINTS, VIDEO_FAMILIES, Asks, Replay
from tiny_models import clip, module_state

import focuslib
from focuslib.errors import InputError, UserError
from focuslib.grid import CoordinateGrid, VisualGrid
from focuslib.methods import Adaptiv, Cmc, Dense, Focus, FrameFusion
from focuslib.models import HfVLM, TinyOnevision, load_vlm
from focuslib.models.media import Clip
from focuslib.models.registry import named
from focuslib.prefill.decoder import find_decoder
from focuslib.prefill.record import Prefill

torch.set_num_threads(1)
FOCUS = {"vector_size": 8, "m_tile": 64}
DROPS = [((0,), (0.6,)), ((1,), (0.5,)), ((2,), (0.4,)), ((4,), (0.3,)), ((0, 1, 2), (0.6, 0.4, 0.2))]
METHODS = [
    Focus(selected_layers=(0, 2), retention=(0.6, 0.3), **FOCUS),
    FrameFusion(cost=0.5),
    Adaptiv(threshold=0.3),
    Cmc(linear_threshold=0.7, interval=3, i_frame=1),
]
STEPS = 16


@dataclass(frozen=True)
class Watched(Focus):
    """Focus that notes which rows of the prompt are left at the end."""

    left: dict = field(default_factory=dict)

    def end(self, prefill: Prefill) -> None:
        self.left["rows"] = prefill.kept


def loaded(folder, attention: str = "sdpa"):
    vlm = load_vlm("hf", str(folder), device="cpu")
    vlm.model.set_attn_implementation(attention)
    vlm.model.generation_config.eos_token_id = None
    return vlm


def picture(width: int = 64, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(clip(1, seed)[0]).resize((width, height))


def video(frames: int = 6, seed: int = 0) -> np.ndarray:
    return clip(frames, seed)[:, ::3, ::3]


def media_of(name: str):
    return video() if name in VIDEO_FAMILIES else picture()


def decoding_error(vlm, inputs, layers, retention) -> float:
    """The largest difference of logits between cached decoding under Focus and recomputation with all that it decoded.

    Recomputed are the same drops; a row's logits depend on no later row.
    """
    settings, model = {"selected_layers": layers, "retention": retention, **FOCUS}, vlm.model
    with Focus(**settings)(vlm) as run, vlm.running(inputs):
        answer = model.generate(
            **inputs.tensors, do_sample=False, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=list(range(95, model.config.get_text_config().vocab_size)),
        )  # fmt: skip
    assert len(run.last.kept[layers[-1]]) < inputs.grid.length
    new = answer.sequences[:, inputs.tensors["input_ids"].shape[1] : -1]
    longer = {**inputs.tensors, "input_ids": torch.cat([inputs.tensors["input_ids"], new], 1)}
    for name in {"attention_mask", "mm_token_type_ids"} & longer.keys():
        longer[name] = torch.nn.functional.pad(longer[name], (0, new.shape[1]), value=int(name == "attention_mask"))
    with Replay(**settings, kept=run.last.kept)(vlm), vlm.running(inputs):
        logits = model(**longer, use_cache=False).logits[0, -STEPS:]
    return float((logits - torch.cat(answer.logits)).abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_a_family_is_computed_exactly(family_checkpoint, name, attention):
    vlm = loaded(family_checkpoint(name), attention)
    inputs = vlm.prepare(media_of(name), "What moves?")
    decoder, plain = find_decoder(vlm.model), vlm.prefill(inputs)
    before = module_state(decoder)
    with Dense()(vlm):
        assert torch.equal(vlm.prefill(inputs), plain)
    with Asks()(vlm):
        torch.testing.assert_close(vlm.prefill(inputs), plain, rtol=0, atol=1e-5)
    for layers, retention in DROPS:
        assert decoding_error(vlm, inputs, layers, retention) < 2e-5
    assert module_state(decoder) == before
    assert torch.equal(vlm.prefill(inputs), plain)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_every_method_runs_and_keeps_all_text(family_checkpoint, name):
    vlm = loaded(family_checkpoint(name))
    inputs = vlm.prepare(media_of(name), "What moves?")
    text = ~torch.isin(torch.arange(inputs.tensors["input_ids"].shape[1]), inputs.grid.rows())
    for method in METHODS:
        if name not in VIDEO_FAMILIES and method.name in ("framefusion", "cmc"):
            with pytest.raises(InputError, match="give it a video"), method(vlm):
                vlm.prefill(inputs)
            continue
        with method(vlm, trace=method.name == "focus") as run:
            logits = vlm.prefill(inputs)
        assert logits.isfinite().all()
        assert logits.shape[1] == int(text.sum()) + len(run.last.left)
    watched = Watched(selected_layers=(0, 2), retention=(0.3, 0.1), **FOCUS)
    with watched(vlm):
        vlm.prefill(inputs)
    assert torch.isin(text.nonzero().squeeze(1), watched.left["rows"]).all()


GRIDS = {  # frames, rows and columns of six frames of 32 × 32 pixels, and their runs
    "qwen2_5_vl": ((3, 4, 4), 1), "qwen3_vl": ((3, 4, 4), 3), "internvl": ((6, 2, 2), 6), "smolvlm": ((6, 2, 2), 6),
    "llava_next_video": ((6, 2, 2), 1), "video_llama_3": ((6, 4, 4), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_of_a_video(family_checkpoint, name):
    vlm = loaded(family_checkpoint(name))
    inputs = vlm.prepare(video(), "What moves?")
    grid, (shape, runs) = inputs.grid, GRIDS[name]
    assert isinstance(grid, VisualGrid)
    assert (grid.num_frames, grid.height, grid.width, len(grid.spans)) == (*shape, runs)
    ids = inputs.tensors["input_ids"][0]
    assert set(ids[grid.rows()].tolist()) <= set(vlm.placeholder_ids)
    assert not torch.isin(ids, torch.tensor(vlm.placeholder_ids)).sum() - grid.length


IMAGES = {  # tokens of a picture twice as wide as high: the media's rows and columns
    "qwen2_5_vl": [(2, 5)], "qwen3_vl": [(2, 5)], "internvl": [(2, 4), (2, 2)], "smolvlm": [(2, 4), (2, 2)],
    "llava_next_video": [(4, 4), (4, 9)], "video_llama_3": [(2, 5)], "mistral3": [(2, 4)], "paddleocr_vl": [(2, 5)],
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_the_grid_of_an_image(family_checkpoint, name):
    grid = loaded(family_checkpoint(name)).prepare(picture(96, 48), "What is it?").grid
    assert grid.one_picture
    if isinstance(grid, VisualGrid):
        assert [(grid.height, grid.width)] == IMAGES[name]
        return
    places = torch.tensor(grid.coordinates)
    found = [tuple((1 + places[places[:, 0] == medium, 2:].amax(0)).tolist()) for medium in range(len(grid.media))]
    assert found == IMAGES[name]
    if name == "internvl":  # tile by tile, left to right
        assert grid.coordinates[:8] == tuple(
            (0, 0, row, 2 * tile + column) for tile in (0, 1) for row in (0, 1) for column in (0, 1)
        )


def test_frames_that_were_compressed_are_unequal(family_checkpoint):
    vlm = loaded(family_checkpoint("video_llama_3"))
    still = np.repeat(video(1), 4, 0)
    still[2, :16, :16] = 255 - still[2, :16, :16]
    grid = vlm.prepare(still, "What moves?").grid
    assert isinstance(grid, CoordinateGrid)
    sizes = grid.media[0]
    assert len(sizes) > 1 and len(set(sizes)) > 1
    for method in METHODS:
        with method(vlm):
            vlm.prefill(vlm.prepare(still, "What moves?"))


def test_timestamps_are_the_frames_own_times(family_checkpoint):
    frames = video(4)
    vlm = loaded(family_checkpoint("qwen3_vl"))
    inputs = vlm.prepare(Clip(frames, (0.0, 1.0, 9.0, 12.0), 14.0), "When?")
    text = vlm.tokenizer.decode(inputs.tensors["input_ids"][0])
    assert text.count(" seconds>") == 2
    assert "<0.5 seconds>" in text and "<10.5 seconds>" in text
    slow = loaded(family_checkpoint("qwen2_5_vl")).prepare(Clip(frames, (0.0, 2.0, 4.0, 6.0), 8.0), "When?")
    assert slow.tensors["second_per_grid_ts"].tolist() == [4.0]


MANY = ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_next_video", "video_llama_3"]


@pytest.mark.parametrize("name", MANY)
@torch.inference_mode()
def test_two_videos_and_three_images_keep_to_themselves(family_checkpoint, name):
    vlm = loaded(family_checkpoint(name))
    media = [video(), picture(), video(seed=1), picture(seed=2), picture(48, 48, 3)]
    inputs = vlm.prepare(media, "<video> then <image> and <video>, <image>, <image>: what moves?")
    grid = inputs.grid
    assert len(grid.media) >= 5
    assert sum(len(frames) > 1 for frames in grid.media) == 2
    medium = grid.medium_of()
    numbers = torch.arange(grid.length)
    near = grid.candidates(numbers, 2, 2)
    assert (medium[near.clamp(min=0)] == medium)[near >= 0].all()
    ends = {}
    for method in METHODS:
        with method(vlm, trace=method.name == "focus") as run:
            vlm.prefill(inputs)
        if method.name == "focus":
            ends[method.name] = run.trace.group_index("q_proj", 0).long() // run.trace.codes["q_proj"][0].shape[1]
        else:
            ends[method.name] = torch.from_numpy(method.links(run.last).target).long()[:, None]
    for end in ends.values():
        assert (medium[end] == medium[:, None]).all()
        assert (end != numbers[:, None]).any()  # and something was concentrated
    prefill = Prefill(grid, None, inputs.tensors["input_ids"].shape[1], torch.device("cpu"), False)
    after = vlm.tokenizer.decode(inputs.tensors["input_ids"][0, prefill.question :])
    assert ": what moves?" in after
    assert not torch.isin(inputs.tensors["input_ids"][0, prefill.question :], torch.tensor(vlm.placeholder_ids)).any()


def test_media_and_text_in_any_order(family_checkpoint):
    vlm = loaded(family_checkpoint("qwen3_vl"))
    one, other = picture(), video()

    def text_of(media, prompt):
        ids = vlm.prepare(media, prompt).tensors["input_ids"][0].tolist()
        image, _ = vlm.placeholder_ids
        kept = [token for token, before in zip(ids, [None, *ids], strict=False) if token != before or token < image]
        return vlm.tokenizer.decode(kept).replace("<|image_pad|>", "I").replace("<|video_pad|>", "V")

    content = [
        {"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": " then "}, {"type": "video"},
        {"type": "text", "text": " end"},
    ]  # fmt: skip
    written = text_of([one, other], content)
    assert "First <|vision_start|>I<|vision_end|> then <0." in written and "V<|vision_end|> end" in written
    assert text_of([one, other], "First <image> then <video> end") == written
    assert "I<|vision_end|><0." in text_of([one, other], "no marks")
    with pytest.raises(InputError, match="1 places for media in the chat content, and 2 media"):
        vlm.prepare([one, other], content[:2])
    with pytest.raises(InputError, match=r"the prompt itself holds image markers \(<\|image_pad\|>\)"):
        vlm.prepare(one, "an <|image_pad|> of mine")
    assert vlm.prepare(None, "Hello").grid is None


def test_what_a_family_cannot_take_is_refused(family_checkpoint):
    with pytest.raises(InputError, match="mistral3 takes no videos; give images"):
        loaded(family_checkpoint("mistral3")).prepare(video(), "What moves?")
    with pytest.raises(InputError, match="smolvlm takes images or videos, not both in one prompt"):
        loaded(family_checkpoint("smolvlm")).prepare([video(), picture()], "What moves?")


def test_the_answer_is_the_stock_models_own(family_checkpoint):
    """What the adapter hands over is what the family's own processor and generate make of the same prompt."""
    vlm = loaded(family_checkpoint("internvl"))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = vlm.processor.apply_chat_template(messages, add_generation_prompt=True)
    ready = vlm.processor(text=text, images=picture(), return_tensors="pt")
    expected = vlm.model.generate(**ready, do_sample=False, max_new_tokens=8)[0, ready["input_ids"].shape[1] :]
    assert vlm.generate_ids(vlm.prepare(picture(), "What is it?"), 8).tolist() == expected.tolist()
    assert isinstance(vlm.generate(picture(), "What is it?"), str)


def test_a_checkpoint_with_code_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(UserError, match=r"its model needs code of its own .*trust_remote_code.*never run here"):
        load_vlm("hf", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="a bert is no model that answers about images or videos"):
        load_vlm("hf", str(tmp_path))
    with pytest.raises(UserError, match="hf: name a checkpoint"):
        load_vlm("hf")


def test_names_of_checkpoints(family_checkpoint, tmp_path):
    assert named("llava_vid", None) == ("llava_vid", None)
    assert named("hf", "Qwen/Qwen3-VL-8B-Instruct") == ("Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    assert named("Qwen/Qwen3-VL-8B-Instruct")[0] == "Qwen3-VL-8B-Instruct"
    assert named("mine", "Qwen/Qwen3-VL-8B-Instruct") == ("mine", "Qwen/Qwen3-VL-8B-Instruct")
    assert named("hf", "/somewhere/models--a--B-7B/snapshots/0123")[0] == "B-7B"
    assert named("hf", "/somewhere/qwen2_5_vl/")[0] == "hf-qwen2_5_vl"  # no adapter's name
    with pytest.raises(UserError, match="unknown model 'llava_vidd'; did you mean llava_vid"):
        named("llava_vidd")
    folder = family_checkpoint("qwen2_5_vl")
    vlm = focuslib.load(str(folder), device="cpu", frames=5, fps=1.5)
    assert (vlm.name, vlm.sampling.max_frames, vlm.sampling.per_second) == ("hf-qwen2_5_vl", 5, 1.5)
    assert vlm.identity()[-1] == str(vlm.sampling) != str(HfVLM.default_sampling)
    assert isinstance(focuslib.load("tiny_onevision", device="cpu"), TinyOnevision)
    with pytest.raises(UserError, match="fps is 0; it must be above 0"):
        focuslib.load(str(folder), device="cpu", fps=0)


def test_the_page_on_models_of_your_own_runs(family_checkpoint):
    page = (Path(__file__).parents[1] / "docs" / "own_model.md").read_text(encoding="utf-8")
    code = page[page.rindex("```python") :].removeprefix("```python").split("```")[0]
    assert len(code.strip().splitlines()) <= 40
    names = {}
    exec(code, names)
    vlm = names["MyVLM"].load(family_checkpoint("internvl"))
    inputs = vlm.prepare(video(12), "What moves?")
    assert len(inputs.grid.spans) == inputs.grid.num_frames == 12
    with torch.inference_mode():
        plain = vlm.prefill(inputs)
        with Dense()(vlm):
            assert torch.equal(vlm.prefill(inputs), plain)
    for method in METHODS:
        with method(vlm):
            vlm.generate(video(4), "What moves?", 2)
