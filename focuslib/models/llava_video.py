"""LLaVA-Video: lmms-lab/LLaVA-Video-7B-Qwen2, in its original layout.

The conversions to the transformers layout on the hub pool and pack videos like LLaVA-OneVision; they are refused.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.grid import VisualGrid
from focuslib.models.layout import TokenLayout, rows_layout
from focuslib.models.llava import Llava
from focuslib.models.media import FrameSampling


class LlavaVideo(Llava):
    """LLaVA-Video (Qwen2): a frame a second, at most 64; average-pooled to 13 × 13 tokens, a newline after each row."""

    name = "llava_vid"
    checkpoint = "lmms-lab/LLaVA-Video-7B-Qwen2"
    default_sampling = FrameSampling(max_frames=64, per_second=1)
    newline_position = "grid"
    stock_layout = False

    @torch.inference_mode()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels [F, 3, side, side] → features [F · rows · (columns + 1), D], a newline after each row."""
        model, side = self.model.model, self.patches_per_side
        layer = model.config.vision_feature_layer
        tower = model.vision_tower(pixels.to(self.device, self.dtype), output_hidden_states=True, return_dict=True)
        patches = model.multi_modal_projector(tower.hidden_states[layer])
        maps = patches.view(len(pixels), side, side, -1).permute(0, 3, 1, 2)
        maps = F.avg_pool2d(maps, 2).permute(0, 2, 3, 1)
        newline = model.image_newline.to(maps).expand(*maps.shape[:2], 1, -1)
        return torch.cat((maps, newline), dim=2).flatten(0, 2)

    def video_grid(self, start: int, num_frames: int) -> VisualGrid:
        """The grid of a video; the newlines are a column of it."""
        rows = self.patches_per_side // 2
        columns = rows + 1
        frame = rows * columns
        return VisualGrid(start, num_frames * frame, num_frames, rows, columns, frame, columns)

    def layout(self, grid: VisualGrid, size: tuple[int, int]) -> TokenLayout:
        is_video = grid == self.video_grid(grid.start, grid.num_frames)
        return rows_layout(grid, newline=True) if is_video else super().layout(grid, size)
