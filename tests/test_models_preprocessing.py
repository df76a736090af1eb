"""Pixels, prompts and token counts of the four VLMs: against independent derivations and published lengths."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizer import write_tokenizer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from vlm_oracle import read_config, write_checkpoint

from focuslib.errors import UserError
from focuslib.methods import METHODS
from focuslib.models import LlavaOnevision, LlavaVideo, MiniCPMV, Qwen25VL
from focuslib.models.llava import SIGLIP_SO400M, original_config
from focuslib.models.minicpmv import frame_slices, frame_text, slice_grid

PUBLISHED = Path(__file__).parents[1] / "params" / "published" / "sequence_lengths.csv"
PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SIZES = [(64, 64), (320, 240), (640, 480), (480, 854), (1280, 720), (90, 700)]  # width, height
# images (width, height) whose sequences have the published lengths
PUBLISHED_IMAGES = {
    ("llava_onevision", "vqav2"): (640, 510),
    ("llava_onevision", "mme"): (640, 166),
    ("llava_onevision", "mmbench"): (640, 353),
    ("qwen2_5_vl", "vqav2"): (640, 490),
    ("qwen2_5_vl", "mme"): (640, 108),
    ("qwen2_5_vl", "mmbench"): (640, 103),
}


class Stub:
    """A model that is little more than its configuration."""

    def __init__(self, config):
        self.config = config

    def eval(self):
        return self

    def get_input_embeddings(self):
        return torch.nn.Embedding(160, 4)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth random RGB image of `size` (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def llava_config():
    return original_config(None, {"image_grid_pinpoints": PINPOINTS}, SIGLIP_SO400M)


@pytest.fixture(scope="module")
def onevision(llava_config):
    return LlavaOnevision(Stub(llava_config), None, LlavaOnevision.default_sampling)


@pytest.fixture(scope="module")
def qwen():
    config = Qwen25VL.architecture(None, read_config("qwen2_5_vl")).config
    return Qwen25VL(Stub(config), None, Qwen25VL.default_sampling)


def normalised(image: Image.Image) -> np.ndarray:
    return (np.asarray(image).astype(np.float32) / 255 - 0.5) / 0.5


@pytest.mark.parametrize("size", SIZES)
def test_llava_frames(onevision, size):
    expected = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC)(
        picture(size), return_tensors="np"
    ).pixel_values
    pixels = onevision.pixel_values(np.asarray(picture(size))[None])
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=0, atol=1e-6)


def best_resolution(width: int, height: int) -> tuple[int, int]:
    """The pinpoint (width, height) that keeps most of the image's pixels and, of those, wastes the least."""
    ranked = []
    for rows, columns in PINPOINTS:
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        ranked.append((kept, kept - rows * columns, (columns, rows)))
    return max(ranked, key=lambda entry: entry[:2])[2]


def letterboxed(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Resized to fit and centred on black."""
    by_width, by_height = target[0] / image.width, target[1] / image.height
    if by_width < by_height:
        size = (target[0], min(math.ceil(image.height * by_width), target[1]))
    else:
        size = (min(math.ceil(image.width * by_height), target[0]), target[1])
    canvas = Image.new("RGB", target)
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    return canvas


@pytest.mark.parametrize("size", [*SIZES, (3000, 100)])
def test_llava_image_tiles(onevision, size):
    image = picture(size)
    target = best_resolution(*size)
    large = letterboxed(image, target)
    tiles = [image.resize((384, 384), Image.Resampling.BICUBIC)]
    tiles += [large.crop((x, y, x + 384, y + 384)) for y in range(0, target[1], 384) for x in range(0, target[0], 384)]
    expected = np.stack([normalised(tile) for tile in tiles]).transpose(0, 3, 1, 2)
    pixels = onevision.image_tiles(image)
    assert pixels.shape == expected.shape
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [*SIZES, (3000, 100), (2000, 2000)])
def test_llava_tile_map(onevision, size):
    """The unpadded map: the image's own rows and columns of patches, at most about nine tiles; and a newline column."""
    width, height = size
    target_width, target_height = (27 * side // 384 for side in best_resolution(*size))
    if width / height > target_width / target_height:
        rows, columns = int(round(height * target_width / width, 7)), target_width
        rows += (target_height - rows) % 2  # padding is cut off in equal halves
    else:
        rows, columns = target_height, int(round(width * target_height / height, 7))
        columns += (target_width - columns) % 2
    times = math.sqrt(rows * columns / (9 * 27 * 27))
    if times > 1.1:
        rows, columns = int(rows // times), int(columns // times)
    grid = onevision.image_grid(5, (height, width))
    assert (grid.height, grid.width, grid.length) == (rows, columns + 1, 729 + rows * (columns + 1))
    assert (grid.start, grid.frame_stride, grid.height_stride, grid.width_stride) == (5, 27, columns + 1, 1)


@pytest.mark.parametrize("size", [*SIZES, (500, 500), (448, 448), (449, 448), (448, 449)])
def test_minicpmv_slices(size):
    image, scale = picture(size), 448
    stock = MiniCPMV4_6ImageProcessorPil().get_sliced_grid(size[::-1], 2, scale)
    grid = slice_grid(size)
    assert grid == (tuple(stock[::-1]) if stock else None)

    def fitted(width: float, height: float) -> tuple[int, int]:
        rows = int(scale / math.sqrt(width / height))
        return tuple(max(round(side / 14), 1) * 14 for side in (int(rows * (width / height)), rows))

    parts = [image.resize(fitted(*size), Image.Resampling.BICUBIC)]
    if grid:
        columns, rows = grid
        part = fitted(max(round(size[0] / columns), 1), max(round(size[1] / rows), 1))
        large = image.resize((part[0] * columns, part[1] * rows), Image.Resampling.BICUBIC)
        corners = [(x * part[0], y * part[1]) for y in range(rows) for x in range(columns)]
        parts += [large.crop((x, y, x + part[0], y + part[1])) for x, y in corners]
    slices = frame_slices(image)
    assert len(slices) == len(parts) == (3 if grid else 1)
    for pixels, expected in zip(slices, parts, strict=True):
        np.testing.assert_allclose(pixels.numpy(), normalised(expected).transpose(2, 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [*SIZES, (3000, 100), (1600, 1200)])
def test_qwen_pixels(qwen, size):
    """Patches of 14 × 14 in two equal time steps, in the order of the 2 × 2 groups that become one token."""
    width, height = size
    rows, columns = max(round(height / 28), 1), max(round(width / 28), 1)
    if round(height / 28) * round(width / 28) * 784 > 1605632:
        beta = math.sqrt(width * height / 1605632)
        rows, columns = max(math.floor(height / beta / 28), 1), max(math.floor(width / beta / 28), 1)
    elif round(height / 28) * round(width / 28) < 256:
        beta = math.sqrt(256 * 784 / (width * height))
        rows, columns = math.ceil(height * beta / 28), math.ceil(width * beta / 28)
    image = picture(size).resize((columns * 28, rows * 28), Image.Resampling.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    values = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)
    patches = [
        np.repeat(values[:, None, y : y + 14, x : x + 14], 2, axis=1).ravel()
        for group_y in range(0, rows * 28, 28)
        for group_x in range(0, columns * 28, 28)
        for y in (group_y, group_y + 14)
        for x in (group_x, group_x + 14)
    ]
    pixels, grid = qwen.pixel_values(picture(size))
    assert grid.tolist() == [[1, rows * 2, columns * 2]]
    assert qwen.tokens(grid) == rows * columns
    np.testing.assert_allclose(pixels.numpy(), np.stack(patches), rtol=0, atol=2e-6)


def test_qwen_refuses_a_line(qwen):
    with pytest.raises(UserError, match="aspect ratio"):
        qwen.pixel_values(picture((3000, 10)))


def published_rows():
    with PUBLISHED.open() as file:
        return [(r["model"], r["dataset"], *(int(r[k]) for k in list(r)[2:])) for r in csv.DictReader(file)]


@pytest.mark.parametrize(("model", "dataset", "length", "frames", "patches"), published_rows())
def test_published_sequence_lengths(llava_config, onevision, qwen, model, dataset, length, frames, patches):
    if (model, dataset) in PUBLISHED_IMAGES:
        width, height = PUBLISHED_IMAGES[model, dataset]
        if model == "llava_onevision":
            grid = onevision.image_grid(0, (height, width))
        else:
            _, patch_grid = qwen.pixel_values(picture((width, height)))
            grid = qwen.assemble_ids([150] * qwen.tokens(patch_grid), torch.zeros(1), patch_grid).grid
    elif model == "minicpm_v":
        columns, rows = slice_grid((320, 240) if dataset == "mvbench" else (640, 360)) or (0, 0)
        text = frame_text(columns, rows, 64)
        tokens = sum(text.count(marker) for marker in ("<unk>", "image>", "slice>", "\n")) + 1
        grid = MiniCPMV(Stub(MiniCPMV.architecture(None, read_config("minicpmv")).config), None, None).video_grid(
            0, tokens * frames, frames
        )
    else:
        family = {"llava_vid": LlavaVideo, "llava_onevision": LlavaOnevision}[model]
        grid = family(Stub(llava_config), None, None).video_grid(0, frames)
    assert (grid.length, grid.num_frames, grid.length // grid.num_frames) == (length, frames, patches)


VLMS = {
    "llava_onevision": (LlavaOnevision, True),
    "llava_video": (LlavaVideo, True),
    "minicpmv": (MiniCPMV, False),
    "qwen2_5_vl": (Qwen25VL, False),
}


@pytest.fixture(scope="module", params=list(VLMS))
def loaded(request, tmp_path_factory):
    """A tiny checkpoint of each family, with a tokenizer."""
    family, (cls, original_llava) = request.param, VLMS[request.param]
    extra = None
    if family == "qwen2_5_vl":
        from test_models_qwen2_5_vl import random_tower

        extra = random_tower()
    folder = write_checkpoint(family, tmp_path_factory.mktemp(family), extra=extra)
    write_tokenizer(folder)
    options = {"vision_config": read_config(family)["_tiny_vision_config"]} if original_llava else {}
    return cls.load(folder, **options)


def around(vlm, inputs) -> tuple[str, str]:
    """The prompt's text before and after the visual tokens."""
    embeds = inputs.tensors.get("inputs_embeds")
    if embeds is None:
        ids = inputs.tensors["input_ids"][0]
    else:  # the nearest token embedding
        table = vlm.model.get_input_embeddings().weight.detach()
        ids = torch.cdist(embeds[0].clone(), table).argmin(1)
    decode = vlm.tokenizer.decode
    return decode(ids[: inputs.grid.start]), decode(ids[inputs.grid.stop :])


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"


def test_image_prompt_and_answer(loaded):
    inputs = loaded.prepare(picture((120, 68)), "What?")
    before, after = around(loaded, inputs)
    if loaded.name == "qwen2_5_vl":
        assert (before, after) == (SYSTEM + "<|vision_start|>", "<|vision_end|>What?" + END)
    elif loaded.name == "minicpm_v":  # the newline after a frame is a visual token
        assert (before, after) == (SYSTEM, "What?" + END)
    else:
        assert (before, after) == (SYSTEM, "\nWhat?" + END)
    assert isinstance(loaded.generate(picture((120, 68)), "What?", 4), str)


def test_video_prompt_and_answer(loaded):
    frames = np.stack([np.asarray(picture((120, 68), seed)) for seed in range(3)])
    if loaded.name == "qwen2_5_vl":
        with pytest.raises(UserError, match="takes images"):
            loaded.prepare(frames, "What?")
        return
    inputs = loaded.prepare(frames, "What?")
    before, after = around(loaded, inputs)
    newline = {"llava_vid": "\n", "minicpm_v": ""}.get(loaded.name)
    assert before == SYSTEM
    if loaded.name == "llava_onevision":  # the video's closing newline embedding is no token's
        assert after.endswith("\nWhat?" + END) and len(after) > len("\nWhat?" + END)
    else:
        assert after == f"{newline}What?" + END
    assert inputs.grid.num_frames == 3
    assert inputs.grid.length % 3 == 0
    assert isinstance(loaded.generate(frames, "What?", 4), str)


def test_text_alone(loaded):
    inputs = loaded.prepare(None, "What?")
    assert inputs.grid is None
    length = len(loaded.token_ids(SYSTEM + "What?" + END))
    assert loaded.prefill(inputs).shape[1] == length


def test_minicpmv_follows_the_checkpoints_template_and_terminators(loaded):
    if not isinstance(loaded, MiniCPMV):
        return
    ends = loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert loaded.generation == {"repetition_penalty": 1.2, "pad_token_id": 0, "eos_token_id": ends}
    assert loaded.chat("Hi") == SYSTEM + "Hi" + END
    loaded.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert loaded.chat("Hi") == "[Hi]"
    loaded.tokenizer.chat_template = None


def test_image_markers_in_the_prompt_are_refused(loaded):
    marker = {"minicpm_v": "<image>", "qwen2_5_vl": "<|image_pad|>"}.get(loaded.name)
    if marker:
        with pytest.raises(UserError, match="image markers"):
            loaded.prepare(picture((120, 68)), f"What is {marker}?")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_every_family(loaded, name):
    """Through the one patch; a method says in one line what a family or an image lacks."""
    image_only = loaded.name == "qwen2_5_vl"
    frames = np.stack([np.asarray(picture((120, 68), seed)) for seed in range(4)])
    media = Image.fromarray(frames[0]) if image_only else frames
    inputs = loaded.prepare(media, "What?")
    settings = {"focus": {"selected_layers": (1, 3), "retention": (0.5, 0.2)}, "framefusion": {"cost": 0.7}}
    method = METHODS[name](**settings.get(name, {}))
    lacking = None
    if image_only and name in ("cmc", "framefusion", "evs", "dycoke", "flashvid", "fewer_frames"):
        lacking = "video"
    if loaded.name == "minicpm_v" and name in ("visionzip", "flashvid", "fewer_pixels"):
        lacking = f"{name}: the frames here are no whole rows of tokens"  # slices, markers and a resampler's queries
    if lacking:
        with pytest.raises(UserError, match=lacking), method(loaded):
            loaded.prefill(loaded.prepare(media, "What?"))
        return
    plain = loaded.prefill(inputs)
    with method(loaded) as run:
        inputs = loaded.prepare(media, "What?")  # inside, for methods that watch the vision tower
        answer = loaded.generate_ids(inputs, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
        assert 0 <= run.sparsity < 1
    assert len(answer) == 3
    assert torch.equal(loaded.prefill(inputs), plain)
