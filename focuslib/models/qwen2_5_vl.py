"""Qwen2.5-VL on the stock transformers class: Qwen/Qwen2.5-VL-7B-Instruct, for images."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.models.base import ASSISTANT, SYSTEM, VLM, Inputs, Media
from focuslib.models.checkpoint import Architecture
from focuslib.models.media import FrameSampling

MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1605632  # of an image after resizing, as published


class Qwen25VL(VLM):
    """Qwen2.5-VL: an image at its own aspect ratio, one token for 28 × 28 pixels."""

    name = "qwen2_5_vl"
    checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"
    vision_modules = ("model.visual",)
    default_sampling = FrameSampling(max_frames=1)

    @classmethod
    def architecture(cls, folder: Path, raw: dict[str, Any]) -> Architecture:
        family = raw.get("model_type")
        if family != "qwen2_5_vl":
            raise UserError(f"{folder}: a checkpoint of model type {family!r}; {cls.name} needs qwen2_5_vl")
        return Architecture(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig.from_dict(raw))

    def prepare(self, media: Media | None, prompt: str) -> Inputs:
        if media is None:
            return self.assemble_ids(self.token_ids(SYSTEM + prompt + ASSISTANT), None, None)
        image = self.open(media)
        if not isinstance(image, Image.Image):
            raise UserError(
                f"{self.name} takes images, as published; give an image, or load the checkpoint by the adapter hf for "
                "videos"
            )
        pixels, grid = self.pixel_values(image)
        pads = "<|image_pad|>" * self.tokens(grid)
        text = f"{SYSTEM}<|vision_start|>{pads}<|vision_end|>{prompt}{ASSISTANT}"
        return self.assemble_ids(self.token_ids(text), pixels, grid)

    def pixel_values(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """An RGB image → (patches [h·w, 3·2·14·14] float32, [1, 3] int64: one frame, h rows, w columns of patches)."""
        vision = self.model.config.vision_config
        processor = Qwen2VLImageProcessorPil(
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )
        try:
            ready = processor(image, return_tensors="pt")
        except ValueError as error:
            raise UserError(f"an image of {image.width} × {image.height} pixels: {error}") from error
        return ready.pixel_values, ready.image_grid_thw

    def tokens(self, grid: Tensor) -> int:
        """Visual tokens of an image of a patch grid [1, 3]."""
        return int(grid.prod()) // self.model.config.vision_config.spatial_merge_size**2

    def assemble_ids(self, ids: list[int], pixels: Tensor | None, grid: Tensor | None) -> Inputs:
        """Inputs of a prompt's token ids, in which each visual token of the image is an image placeholder.

        The model computes the three-dimensional rotary positions itself, from the token types and the patch grid.
        """
        config, device = self.model.config, self.device
        tokens = torch.tensor([ids], dtype=torch.long, device=device)
        tensors = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if pixels is None or grid is None:
            return Inputs(tensors, None)
        if ids.count(config.image_token_id) != self.tokens(grid):
            raise UserError("the prompt itself holds image markers such as <|image_pad|>; remove them")
        is_visual = tokens == config.image_token_id
        tensors |= {
            "pixel_values": pixels.to(device),
            "image_grid_thw": grid.to(device),
            "mm_token_type_ids": is_visual.long(),
        }
        merge = config.vision_config.spatial_merge_size
        rows, columns = (int(side) // merge for side in grid[0, 1:])
        start = ids.index(config.image_token_id)
        return Inputs(tensors, VisualGrid(start, rows * columns, 1, rows, columns, rows * columns, columns))
