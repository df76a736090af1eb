"""LLaVA-OneVision: lmms-lab/llava-onevision-qwen2-7b-ov, or its transformers layout."""

import math

import torch
from torch import Tensor

from focuslib.grid import VisualGrid
from focuslib.models.llava import Llava
from focuslib.models.media import FrameSampling


class LlavaOnevision(Llava):
    """LLaVA-OneVision (Qwen2): 32 uniform frames of 14 × 14 tokens, one newline at the video's end; images in tiles."""

    name = "llava_onevision"
    checkpoint = "lmms-lab/llava-onevision-qwen2-7b-ov"
    default_sampling = FrameSampling(max_frames=32)
    newline_position = "one_token"
    stock_layout = True

    @torch.inference_mode()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels [F, 3, side, side] → visual features with the closing newline, [F·tokens + 1, D]."""
        pixels = pixels.to(self.device, self.dtype)
        return self.model.get_video_features(pixels[None], return_dict=True).pooler_output[0]

    def video_grid(self, start: int, num_frames: int) -> VisualGrid:
        """The grid of a video; its newline is not part of it."""
        side = math.ceil(self.patches_per_side / 2)
        frame = side * side
        return VisualGrid(start, num_frames * frame, num_frames, side, side, frame, side)
