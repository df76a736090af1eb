"""Real processors and tokenizers for tiny checkpoints of today's families: one token a character, small pictures."""

import string
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, decoders, models

import focuslib  # noqa: F401  before any class of transformers that imports torchvision

VOCABULARY = 192
_TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}IMAGE"
    "{% elif p.type == 'video' %}VIDEO{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BASE = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
QWEN = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip
INTERN = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
SMOL = {
    "fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "video_token": "<video>",
    "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
}  # fmt: skip
LLAVA = {"image_token": "<image>", "video_token": "<video>"}
PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
PADDLE = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
PIXELS = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
PIXELS_OF_VIDEO = PIXELS | {"size": {"shortest_edge": 1024, "longest_edge": 8192}}


def tokenizer(named: dict[str, str], special: tuple[str, ...] = ()) -> tf.PreTrainedTokenizerFast:
    """Printable characters, then the special tokens; named: those that processors ask for."""
    vocabulary = {character: index for index, character in enumerate("\n" + string.printable[:95])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([*BASE, *named.values(), *special])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )


def template(image: str, video: str = "") -> str:
    return _TURN.replace("IMAGE", image).replace("VIDEO", video)


def qwen(name: str) -> Any:
    """The processors of Qwen2.5-VL and Qwen3-VL."""
    text, frames = tokenizer(QWEN), PIXELS_OF_VIDEO | {"temporal_patch_size": 2}
    chat = template(*(f"<|vision_start|>{QWEN[token]}<|vision_end|>" for token in ("image_token", "video_token")))
    images = tf.Qwen2VLImageProcessor(**PIXELS, temporal_patch_size=2)
    if name == "qwen3_vl":
        chat = template("<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>")
        return tf.Qwen3VLProcessor(images, text, tf.Qwen3VLVideoProcessor(**frames), chat_template=chat)
    return tf.Qwen2_5_VLProcessor(images, text, tf.Qwen2VLVideoProcessor(**frames), chat_template=chat)


def internvl() -> Any:
    images = tf.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    return tf.InternVLProcessor(
        images, tokenizer(INTERN), tf.InternVLVideoProcessor(size={"height": 16, "width": 16}), image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )  # fmt: skip


def smolvlm() -> Any:
    sides = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    tiles = tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
    sampling = {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 16}}
    return tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(**sides), tokenizer(SMOL, tiles),
        tf.SmolVLMVideoProcessor(**sides, video_sampling=sampling),
        image_seq_len=4, chat_template=template("<image>", "<video>"),
    )  # fmt: skip


def llava_next_video() -> Any:
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return tf.LlavaNextVideoProcessor(
        tf.LlavaNextVideoVideoProcessor(**sides),
        tf.LlavaNextImageProcessor(**sides, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]),
        tokenizer(LLAVA), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>\n", "<video>\n"),
    )  # fmt: skip


def video_llama_3() -> Any:
    return tf.VideoLlama3Processor(
        tf.VideoLlama3ImageProcessor(**PIXELS), tokenizer(QWEN), tf.VideoLlama3VideoProcessor(**PIXELS_OF_VIDEO),
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )  # fmt: skip


def mistral3() -> Any:
    return tf.PixtralProcessor(
        tf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4), tokenizer(PIXTRAL), patch_size=4,
        spatial_merge_size=2, chat_template=template("[IMG]"),
    )  # fmt: skip


def paddleocr_vl() -> Any:
    return tf.PaddleOCRVLProcessor(
        tf.PaddleOCRVLImageProcessor(**PIXELS), tokenizer(PADDLE), chat_template=template("<|IMAGE_PLACEHOLDER|>")
    )
