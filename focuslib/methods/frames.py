"""What methods ask of frames: whole ones, their sizes, and which tokens are newlines."""

import torch
from torch import Tensor

from focuslib.errors import InputError
from focuslib.grid import Grid, VisualGrid


def require_frames(method: str, grid: Grid) -> None:
    """Raise InputError unless a medium has two or more whole frames."""
    if grid.one_picture:
        raise InputError(f"method {method}: the input has one frame; the method compares frames, so give it a video")
    if isinstance(grid, VisualGrid) and grid.length % grid.num_frames:
        raise InputError(
            f"method {method}: {grid.length} visual tokens are not {grid.num_frames} equal frames; give a video's grid"
        )


def frame_sizes(method: str, grid: Grid) -> list[tuple[int, ...]]:
    """The numbers of tokens of each medium's frames. Raises InputError if they are not whole frames."""
    if not grid.one_picture:
        require_frames(method, grid)
    return list(grid.media)


def newlines(x: Tensor, grid: Grid) -> Tensor:
    """Which visual tokens are newlines: the last column of a video's frames, if it holds one and the same vector.

    x: [S, D]. Returns [S] bool.
    """
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if isinstance(grid, VisualGrid) and grid.height > 1 and len(x) % grid.height_stride == 0:
        last = x[grid.height_stride - 1 :: grid.height_stride]
        found[grid.height_stride - 1 :: grid.height_stride] = bool((last == last[0]).all())
    return found
