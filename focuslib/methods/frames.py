"""Whole frames of a visual grid, for the methods that work frame by frame."""

from focuslib.errors import InputError
from focuslib.grid import VisualGrid


def frame_size(grid: VisualGrid) -> int:
    """Tokens a frame, separators included.

    A frame is never smaller than its rows: the published grid of LLaVA images has a frame stride that only serves
    the neighbourhood of Focus.
    """
    return max(grid.frame_stride, grid.height * grid.height_stride)


def tokens_per_frame(grid: VisualGrid) -> int:
    """Tokens of each frame of a video, for the methods that compare whole frames.

    Not the frame stride: the published grid of MiniCPM-V always has that of a frame cut into slices.
    """
    return grid.length // grid.num_frames


def require_frames(method: str, grid: VisualGrid) -> None:
    """Raise InputError unless the visual tokens are two or more whole frames."""
    if grid.num_frames < 2 or tokens_per_frame(grid) < grid.height * grid.height_stride:
        raise InputError(f"{method}: the input has one frame; the method compares frames, so give it a video")
    if grid.length % grid.num_frames:
        raise InputError(
            f"{method}: {grid.length} visual tokens are not {grid.num_frames} equal frames; give a video's grid"
        )
