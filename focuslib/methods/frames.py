"""A check for the methods that compare whole frames."""

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
