"""The tiny VLM: its training shortcuts change nothing, and the shipped checkpoint answers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from focuslib.models import TinyOnevision
from focuslib.models.tiny import CHECKPOINT
from focuslib.tasks.tinyvideo.questions import prompt, questions
from focuslib.tasks.tinyvideo.scenes import render, sample_scene
from training.data import Batches
from training.model import build_model, pixels
from training.packed import ATTENTION, packed_forward
from training.tokenizer import FOOTER, HEADER, build_tokenizer
from training.train import visual_features


def inputs(tokenizer, frames: np.ndarray, text: str) -> dict[str, torch.Tensor]:
    visual = "<video>" * (36 * len(frames) + 1)
    ids = tokenizer(HEADER + visual + "\n" + text + FOOTER, return_tensors="pt")["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels(torch.from_numpy(frames))[None],
    }


@torch.no_grad()
def test_packed_questions_equal_separate_prompts():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0).eval()
    batch = Batches(tokenizer, {"order": 1.0}, clips=2, asked=3).batch(0)
    embed, decoder = model.get_input_embeddings(), model.model.language_model
    features = model.model.get_video_features(pixels(batch.frames)).pooler_output
    prefix = torch.cat((embed(batch.header).expand(2, -1, -1), features), 1)
    positions = torch.arange(prefix.shape[1]).expand(2, -1)
    decoder.config._attn_implementation = ATTENTION
    packed = packed_forward(decoder, prefix, positions, embed(batch.ids))[-1][:, prefix.shape[1] :].unflatten(
        1, batch.ids.shape[1:]
    )
    decoder.config._attn_implementation = "sdpa"
    video = torch.full((8 * 36 + 1,), model.config.video_token_id)
    for clip, number in ((0, 0), (1, 2)):
        last = int(batch.answer[clip, number])
        ids = torch.cat((batch.header, video, batch.ids[clip, number, : last + 1]))[None]
        alone = model(input_ids=ids, pixel_values_videos=pixels(batch.frames[clip : clip + 1])).logits[0, -1]
        assert torch.allclose(model.lm_head(packed[clip, number, last]), alone, atol=1e-4)


def test_training_batches_are_reproducible():
    def tensors():
        stream = Batches(build_tokenizer(), {"move": 0.5, "order": 0.5}, clips=2, asked=3, shares=(0.5, 1.0))
        return vars(stream.batch(3)).values()

    for a, b in zip(tensors(), tensors(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) if isinstance(a, dict) else a.equal(b)


@torch.no_grad()
def test_training_pictures_are_read_as_the_adapter_reads_images():
    vlm = TinyOnevision.load()
    batch = Batches(build_tokenizer(), {"attributes": 1.0}, clips=2, asked=3, picture=True).batch(0)
    features = visual_features(vlm.model, batch.frames)
    for picture, expected in zip(batch.frames[:, 0], features, strict=True):
        inputs = vlm.prepare(picture.numpy(), "What color is it?")
        visual = inputs.tensors["inputs_embeds"][0, inputs.grid.start : inputs.grid.stop]
        assert torch.allclose(visual, expected, atol=1e-5)
    patches = batch.looks["object_class"]
    assert patches.shape[1] + 1 == features.shape[1] == 144 + 12 * 13
    rows = F.pad(patches[:, 144:], (0, 1)).view(2, 12, 13)
    assert torch.equal(rows[..., :12], patches[:, :144].view(2, 12, 12)) and not rows[..., 12].any()


@pytest.fixture(scope="module")
def shipped():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model, loading = LlavaOnevisionForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(loading.values()), loading
    return tokenizer, model.eval()


def test_shipped_tokenizer_is_the_one_the_code_builds(shipped):
    assert shipped[0].get_vocab() == build_tokenizer().get_vocab()


def test_shipped_checkpoint_is_small(shipped):
    assert sum(p.numel() for p in shipped[1].parameters()) < 2_000_000
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) < 8_000_000


@pytest.mark.parametrize("kind", ["attributes", "needle", "move", "order"])
def test_shipped_checkpoint_answers(shipped, kind):
    tokenizer, model = shipped
    rng, right, asked = np.random.default_rng(0), 0, 0
    for index in range(2000, 2004):  # clips that are in no built split
        scene = sample_scene("tune", kind, index)
        for question in questions(scene)[-2:]:
            options, letter = question.options(rng)
            given = inputs(tokenizer, render(scene), prompt(question.text, options))
            answer = model.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
            right += tokenizer.decode(answer, skip_special_tokens=True) == letter
            asked += 1
    assert right >= 0.7 * asked  # chance is a quarter
