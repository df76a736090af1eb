"""MiniCPM-V 2.6: openbmb/MiniCPM-V-2_6, for video (an image is a video of one frame)."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.models.base import ASSISTANT, SYSTEM, VLM, Inputs, Media
from focuslib.models.checkpoint import Architecture, qwen2_config
from focuslib.models.layout import TokenLayout, slices_layout
from focuslib.models.media import FrameSampling
from focuslib.models.minicpmv_network import MiniCPMVConfig, MiniCPMVModel

SCALE = 448  # pixels a side of a slice's area
MAX_SLICES = 2  # of a video frame, beside the whole frame
SLICES_AT_ONCE = 16  # through the vision tower
VISION_KEYS = (
    "hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size",
)  # fmt: skip


class MiniCPMV(VLM):
    """MiniCPM-V 2.6: a frame a second, at most 64; 64 tokens for a frame and for each of its (at most two) slices."""

    name = "minicpm_v"
    checkpoint = "openbmb/MiniCPM-V-2_6"
    output_head = "llm.lm_head"
    vision_modules = ("vpm", "resampler")
    default_sampling = FrameSampling(max_frames=64, per_second=1, centred=True)
    generation: Mapping[str, Any] = MappingProxyType({"repetition_penalty": 1.2, "pad_token_id": 0})

    def __init__(self, model: MiniCPMVModel, tokenizer: PreTrainedTokenizerBase | None, sampling: FrameSampling):
        super().__init__(model, tokenizer, sampling)
        if tokenizer is not None:  # the published terminators; the checkpoint's files name only the first
            ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
            self.generation = {**self.generation, "eos_token_id": ends}

    @classmethod
    def architecture(cls, folder: Path, raw: dict[str, Any]) -> Architecture:
        family = raw.get("model_type")
        if family != "minicpmv" or "query_num" not in raw:
            raise UserError(f"{folder}: a checkpoint of model type {family!r}; {cls.name} needs minicpmv")
        if str(raw.get("version", 2.6)) != "2.6":
            raise UserError(f"{folder}: MiniCPM-V {raw['version']}; {cls.name} is version 2.6")
        vision = {key: raw["vision_config"][key] for key in VISION_KEYS}
        config = MiniCPMVConfig(
            text_config=qwen2_config(raw), vision_config=Idefics2VisionConfig(**vision), query_num=raw["query_num"]
        )
        return Architecture(MiniCPMVModel, config)

    @classmethod
    def load_tokenizer(cls, folder: Path) -> PreTrainedTokenizerBase | None:
        """The checkpoint's own tokenizer class is remote code; its tokenizer.json says all that is needed."""
        if not (folder / "tokenizer.json").exists():
            return None
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def prepare(self, media: Media | None, prompt: str) -> Inputs:
        if media is None:
            ids = self.token_ids(self.chat(prompt))
            return self.inputs_from_embeds(self.embed(ids), None)
        frames = [Image.fromarray(frame) for frame in self.frames(media)]
        columns, rows = slice_grid(frames[0].size) or (0, 0)
        visual = (frame_text(columns, rows, self.model.config.query_num) + "\n") * len(frames)
        ids = self.token_ids(self.chat(visual + prompt))
        slices = [pixels for frame in frames for pixels in frame_slices(frame)]
        return self.assemble_ids(ids, self.bounds(ids, len(slices)), self.encode(slices), len(frames))

    def chat(self, content: str) -> str:
        """The whole prompt around the user's message, by the checkpoint's own template where it has one."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            return SYSTEM + content + ASSISTANT
        message = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def bounds(self, ids: list[int], count: int) -> list[tuple[int, int]]:
        """Where the tokens of the `count` slices lie in the prompt: [first, last + 1) each."""
        token = self.needed_tokenizer().convert_tokens_to_ids
        starts = _where(ids, token(["<image>", "<slice>"]))
        ends = _where(ids, token(["</image>", "</slice>"]))
        if not len(starts) == len(ends) == count:
            raise UserError("the prompt itself holds image markers such as <image>; remove them")
        return [(start + 1, end) for start, end in zip(starts, ends, strict=True)]

    @torch.inference_mode()
    def encode(self, slices: list[Tensor]) -> Tensor:
        """Slices [3, H, W] in [−1, 1], of any shapes → [N, 64, D]. Those of one shape go through the tower together."""
        features: dict[int, Tensor] = {}
        shapes: dict[torch.Size, list[int]] = {}
        for index, pixels in enumerate(slices):
            shapes.setdefault(pixels.shape, []).append(index)
        for members in shapes.values():
            for start in range(0, len(members), SLICES_AT_ONCE):
                batch = members[start : start + SLICES_AT_ONCE]
                pixels = torch.stack([slices[index] for index in batch]).to(self.device, self.dtype)
                for index, feature in zip(batch, self.model.encode(pixels), strict=True):
                    features[index] = feature
        return torch.stack([features[index] for index in range(len(slices))])

    @torch.inference_mode()
    def embed(self, ids: list[int]) -> Tensor:
        """The embeddings of token ids, [T, D]."""
        return self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=self.device))

    @torch.inference_mode()
    def assemble_ids(self, ids: list[int], bounds: list[tuple[int, int]], features: Tensor, num_frames: int) -> Inputs:
        """The prompt's embeddings with the slices' features [N, 64, D] in their places."""
        embeds = self.embed(ids).clone()
        for (start, stop), feature in zip(bounds, features, strict=True):
            embeds[start:stop] = feature.to(embeds)
        start, stop = bounds[0][0] - 1, bounds[-1][1] + 2  # from the first marker through the last frame's newline
        return self.inputs_from_embeds(embeds, self.video_grid(start, stop - start, num_frames))

    def video_grid(self, start: int, length: int, num_frames: int) -> VisualGrid:
        """The published grid: rows of 8, and always the frame stride of a landscape frame (3 · 64 and the markers)."""
        queries = self.model.config.query_num
        side = math.isqrt(queries)
        return VisualGrid(start, length, num_frames, side, side, frame_stride=3 * queries + 7, height_stride=side)

    def layout(self, grid: VisualGrid, size: tuple[int, int]) -> TokenLayout:
        slices = slice_grid((size[1], size[0])) or (0, 0)
        return slices_layout(grid.num_frames, grid.length // grid.num_frames, self.model.config.query_num, slices)


def _where(ids: list[int], wanted: Any) -> list[int]:
    return [index for index, token in enumerate(ids) if token in wanted]


def frame_text(columns: int, rows: int, queries: int) -> str:
    """The markers of one frame: the whole frame, then its slices row by row."""
    one = "<unk>" * queries
    row = f"<slice>{one}</slice>" * columns
    return f"<image>{one}</image>" + "\n".join([row] * rows)


def frame_slices(frame: Image.Image, scale: int = SCALE, patch: int = 14) -> list[Tensor]:
    """A frame → the whole frame and its slices row by row, each [3, H, W] in [−1, 1], sides multiples of `patch`."""
    whole = _pixels(_resized(frame, fit(frame.size, scale, patch)))
    grid = slice_grid(frame.size, scale)
    if grid is None:
        return [whole]
    columns, rows = grid
    part = (max(round(frame.width / columns), 1), max(round(frame.height / rows), 1))
    width, height = fit(part, scale, patch)
    large = _pixels(_resized(frame, (width * columns, height * rows)))
    slices = [
        large[:, y : y + height, x : x + width]
        for y in range(0, height * rows, height)
        for x in range(0, width * columns, width)
    ]
    return [whole, *slices]


def slice_grid(size: tuple[int, int], scale: int = SCALE) -> tuple[int, int] | None:
    """Columns and rows a frame of `size` (width, height) is cut into; None: not cut.

    Two slices are the most, so it is the two along the longer side (a square frame is cut into rows).
    """
    width, height = size
    if math.ceil(width * height / scale**2) < MAX_SLICES:
        return None
    return (MAX_SLICES, 1) if width > height else (1, MAX_SLICES)


def fit(size: tuple[float, float], scale: int, patch: int) -> tuple[int, int]:
    """The size of the same aspect ratio with about scale² pixels, sides multiples of `patch` and at least one."""
    ratio = size[0] / size[1]
    height = int(scale / math.sqrt(ratio))
    width = int(height * ratio)
    width, height = (max(round(side / patch) * patch, patch) for side in (width, height))
    return width, height


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1) / 255
    return (pixels - 0.5) / 0.5
