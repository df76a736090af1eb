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
