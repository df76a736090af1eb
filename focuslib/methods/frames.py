"""What methods ask of frames: whole ones, their sizes, and which tokens are newlines."""

import torch
from torch import Tensor

from focuslib.errors import InputError
from focuslib.grid import CoordinateGrid, Grid, VisualGrid


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


def frame_shapes(method: str, grid: Grid, blank: Tensor | None = None) -> list[tuple[int, int]]:
    """Rows and columns of every frame of every medium; blank: newlines, which are not counted.

    Raises InputError for frames that are no whole rows of tokens.
    """
    if isinstance(grid, VisualGrid):
        sizes = [size for sizes in frame_sizes(method, grid) for size in sizes]
        shapes = [(size // grid.height_stride, grid.height_stride) for size in sizes]
    else:
        assert isinstance(grid, CoordinateGrid)
        sizes, shapes, first = [size for sizes in grid.media for size in sizes], [], 0
        for size in sizes:
            frame = grid.coordinates[first : first + size]
            first += size
            rows, columns = (max(place[axis] for place in frame) + 1 for axis in (2, 3))
            whole = [place[2:] for place in frame] == [(r, c) for r in range(rows) for c in range(columns)]
            shapes.append((rows, columns) if whole else (0, 0))
    if any(rows * columns != size for size, (rows, columns) in zip(sizes, shapes, strict=True)):
        raise InputError(f"method {method}: the frames here are no whole rows of tokens, which it needs")
    if blank is not None and bool(blank.any()):
        shapes = [(rows, columns - 1) for rows, columns in shapes]
    return shapes
