"""What LLaVA-OneVision and LLaVA-Video share: loading, images, and the prompt around the visual features.

Both are stock LlavaOnevisionForConditionalGeneration models: SigLIP, a two-layer projector, Qwen2.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.models.base import ASSISTANT, SYSTEM, VLM, Inputs, Media
from focuslib.models.checkpoint import Architecture, qwen2_config, read_json
from focuslib.models.layout import TokenLayout, tiles_layout
from focuslib.prefill.tower import watched_tower

# Original (lmms-lab) parameter names → transformers names. The patterns exclude each other, so their order is free.
KEY_MAPPING = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^model\.image_newline": "model.image_newline",
}

SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


class Llava(VLM):
    """The common part. Subclasses say how a video's frames become tokens (`encode_video`, `video_grid`).

    newline_position: where the original's config.json says that newlines go in a video; tells the two families apart.
    stock_layout: whether checkpoints in the transformers layout are of this family (they pool like LLaVA-OneVision).
    """

    vision_modules = ("model.vision_tower", "model.multi_modal_projector")
    newline_position: ClassVar[str]
    stock_layout: ClassVar[bool]

    @classmethod
    def architecture(
        cls, folder: Path, raw: dict[str, Any], vision_config: dict[str, Any] | None = None
    ) -> Architecture:
        """The stock model, from the original layout or (LLaVA-OneVision) the transformers one.

        vision_config: the tower's dimensions, where an original checkpoint does not tell them.
        """
        family = raw.get("model_type")
        if family == "llava_onevision" and cls.stock_layout:
            config, mapping = LlavaOnevisionConfig.from_dict(raw), None
        elif family == "llava_qwen" or "LlavaQwenForCausalLM" in (raw.get("architectures") or ()):
            newline = raw.get("mm_newline_position", cls.newline_position)
            if newline != cls.newline_position:
                raise UserError(
                    f"{folder}: a LLaVA whose newline position is {newline!r}; {cls.name} has {cls.newline_position!r}"
                )
            config, mapping = original_config(folder, raw, vision_config or tower_dimensions(folder, raw)), KEY_MAPPING
        else:
            wanted = "llava_onevision or llava_qwen" if cls.stock_layout else "llava_qwen (the original layout)"
            raise UserError(f"{folder}: a checkpoint of model type {family!r}; {cls.name} needs {wanted}")
        return Architecture(LlavaOnevisionForConditionalGeneration, config, mapping)

    @property
    def patches_per_side(self) -> int:
        """Patches a side of a tile or frame, before pooling (27)."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels [F, 3, side, side] → the visual features with their newlines, [T, D]."""
        raise NotImplementedError

    def video_grid(self, start: int, num_frames: int) -> VisualGrid:
        """The grid of a video."""
        raise NotImplementedError

    def prepare(self, media: Media | None, prompt: str) -> Inputs:
        if media is None:
            return self.assemble_ids(self.token_ids(SYSTEM), None, self.token_ids(prompt + ASSISTANT), 0)
        before, after = self.token_ids(SYSTEM), self.token_ids("\n" + prompt + ASSISTANT)
        opened = self.open(media)
        if isinstance(opened, Image.Image):
            tiles = self.image_tiles(opened)
            size = (opened.height, opened.width)
            return self.assemble_image_ids(before, self.encode_image(tiles, size), after, size)
        return self.assemble_ids(before, self.video_features(opened), after, len(opened))

    def video_features(self, frames: np.ndarray) -> Tensor:
        """Frames [F, H, W, 3] uint8 → the visual features with their newlines [T, D], from the store if there."""
        encode = lambda frames: self.encode_video(self.pixel_values(frames))  # noqa: E731
        if self.store is None:
            return encode(frames)
        return self.store.features(frames, encode, watched_tower(self.model))

    def pixel_values(self, frames: np.ndarray) -> Tensor:
        """Frames [F, H, W, 3] uint8 → [F, 3, side, side] in [−1, 1]: bicubic, without keeping the aspect ratio."""
        side = self.model.config.vision_config.image_size
        if frames.shape[1:3] != (side, side):
            resized = [Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC) for frame in frames]
            frames = np.stack([np.asarray(image) for image in resized])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        return (pixels - 0.5) / 0.5

    def image_tiles(self, image: Image.Image) -> Tensor:
        """An RGB image → [1 + tiles, 3, side, side] in [−1, 1]: the whole image, then tiles of the best resolution."""
        side = self.model.config.vision_config.image_size
        half = [0.5, 0.5, 0.5]
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side},
            image_grid_pinpoints=self.model.config.image_grid_pinpoints,
            image_mean=half,
            image_std=half,
        )
        return processor(image, return_tensors="pt").pixel_values[0]

    @torch.inference_mode()
    def encode_image(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """Tiles [1 + tiles, 3, side, side] of an image of `size` (height, width) → features [T, D].

        The whole image's patches, then the unpadded map of the tiles with a newline after each row.
        """
        tiles = tiles.to(self.device, self.dtype)
        sizes = torch.tensor([size])
        aspect = self.model.config.vision_aspect_ratio
        return self.model.get_image_features(
            tiles[None], sizes, vision_aspect_ratio=aspect, return_dict=True
        ).pooler_output[0]

    def tile_map_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns (with the newline) of the map of the tiles of an image of `size` (height, width)."""
        config, side = self.model.config, self.patches_per_side
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        _, height, width = unpad_image(torch.empty((1, rows * side, columns * side), device="meta"), size).shape
        largest = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (largest * side**2))
        if ratio > 1.1:  # the model shrinks larger maps
            height, width = int(height // ratio), int(width // ratio)
        return height, width + 1

    def image_grid(self, start: int, size: tuple[int, int]) -> VisualGrid:
        """The published grid of an image of `size` (height, width).

        Strides of the tile map, taken over the whole image's patches as well; the "frame" before is one row of those
        patches away, and there are as many frames as video frames of tokens would fit.
        """
        side = self.patches_per_side
        height, width = self.tile_map_shape(size)
        length = side**2 + height * width
        frames = max(1, length // math.ceil(side / 2) ** 2)
        return VisualGrid(start, length, frames, height, width, frame_stride=side, height_stride=width)

    def layout(self, grid: VisualGrid, size: tuple[int, int]) -> TokenLayout:
        if grid == self.image_grid(grid.start, size):
            return tiles_layout(self.patches_per_side, *self.tile_map_shape(size))
        return super().layout(grid, size)

    @torch.inference_mode()
    def assemble_ids(self, before: list[int], features: Tensor | None, after: list[int], num_frames: int) -> Inputs:
        """Embed the text (token ids) around the features of a video of `num_frames`; None: no video."""
        grid = None if features is None else self.video_grid(len(before), num_frames)
        return self._around(before, features, after, grid)

    @torch.inference_mode()
    def assemble_image_ids(
        self, before: list[int], features: Tensor, after: list[int], size: tuple[int, int]
    ) -> Inputs:
        """Embed the text (token ids) around the features of an image of `size` (height, width)."""
        return self._around(before, features, after, self.image_grid(len(before), size))

    def _around(self, before: list[int], features: Tensor | None, after: list[int], grid: VisualGrid | None) -> Inputs:
        embed = self.model.get_input_embeddings()
        parts = [embed(torch.tensor(ids, dtype=torch.long, device=self.device)) for ids in (before, after)]
        if features is not None:
            parts.insert(1, features.to(parts[0]))
        return self.inputs_from_embeds(torch.cat(parts), grid)


def tower_dimensions(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Those of SigLIP so400m, unless an original checkpoint's `mm_vision_tower` is a folder with a config.json."""
    name = raw.get("mm_vision_tower")
    file = folder / name / "config.json" if name else None
    if file is None or not file.is_file():
        return SIGLIP_SO400M
    tower = read_json(file)
    tower = tower.get("vision_config", tower)
    return {key: tower.get(key, value) for key, value in SIGLIP_SO400M.items()}


def original_config(folder: Path, raw: dict[str, Any], vision: dict[str, Any]) -> LlavaOnevisionConfig:
    """The transformers config of an original (llava_qwen) checkpoint.

    The original drops the tower's last layer and takes the hidden state before the final norm.
    """
    if "image_grid_pinpoints" not in raw:
        raise UserError(f"{folder / 'config.json'}: has no image_grid_pinpoints; not a LLaVA with image tiles")
    vision = {**vision, "num_hidden_layers": vision["num_hidden_layers"] - 1}
    aspect = raw.get("image_aspect_ratio", "")
    return LlavaOnevisionConfig(
        text_config=qwen2_config(raw),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect if aspect.startswith("anyres_max_") else "anyres_max_9",
        image_grid_pinpoints=raw["image_grid_pinpoints"],
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )
