"""Where each visual token is drawn: the part of a frame's picture that it stands for."""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from focuslib.grid import CoordinateGrid, Grid, VisualGrid

SEPARATOR = 0.06  # side of the cell of a newline or marker, which stands for no part of the picture


@dataclass
class TokenLayout:
    """Boxes of the S visual tokens, drawn in one or more panels a frame; every panel shows the frame's whole picture.

    frame: [S] int32. panel: [S] uint8, index into panels. box: [S, 4] float32, left, top, width, height in units of the
    picture's width and height (separators lie outside 0 … 1). names: of each frame, where there are several media.
    """

    frame: np.ndarray
    panel: np.ndarray
    box: np.ndarray
    panels: tuple[str, ...] = ("",)
    names: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        return int(self.frame[-1]) + 1

    @classmethod
    def join(cls, parts: list["TokenLayout"], panels: tuple[str, ...]) -> "TokenLayout":
        """Layouts one after another in the sequence."""
        frame, panel, box = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("frame", "panel", "box")
        )
        return cls(frame, panel, box, panels)


def rows_layout(grid: VisualGrid, newline: bool = False) -> TokenLayout:
    """Frames of whole rows, as the strides say. newline: the last column of each row is a newline.

    Several frames are drawn only where the tokens are that many whole frames: images have a frame stride as well.
    """
    whole = grid.length % grid.num_frames == 0 and grid.tokens_per_frame >= grid.height * grid.height_stride
    size = grid.tokens_per_frame if whole else max(grid.length, grid.frame_size)
    position = np.arange(grid.length)
    columns = min(grid.height_stride, size)
    box = cells(position % size, math.ceil(min(size, grid.length) / columns), columns, newline)
    return TokenLayout((position // size).astype(np.int32), np.zeros(grid.length, np.uint8), box)


def grid_layout(grid: Grid) -> TokenLayout:
    """The layout that a grid itself says: frames of whole rows, or of the rows and columns of its coordinates."""
    if isinstance(grid, VisualGrid):
        return rows_layout(grid)
    assert isinstance(grid, CoordinateGrid)
    place = np.array(grid.coordinates)
    _, frame = np.unique(place[:, :2], axis=0, return_inverse=True)  # frames ascend, medium by medium
    box = np.zeros((len(place), 4), np.float32)
    for medium in np.unique(place[:, 0]):
        own = place[:, 0] == medium
        size = 1 / (1 + place[own, 2:].max(0))  # rows, columns
        box[own, :2] = (place[own, 2:] * size)[:, ::-1]
        box[own, 2:] = size[::-1]
    names = frame_names(grid, [f"medium {number}" for number in range(1, 1 + len(grid.media))])
    return TokenLayout(frame.reshape(-1).astype(np.int32), np.zeros(len(place), np.uint8), box, names=names)


def frame_names(grid: Grid, media: list[str]) -> tuple[str, ...]:
    """What each frame is called, by the names of the grid's media; none where there is one medium."""
    if len(grid.media) == 1:
        return ()
    return tuple(
        f"{name}, frame {number}" if len(frames) > 1 else name
        for name, frames in zip(media, grid.media, strict=True)
        for number in range(1, 1 + len(frames))
    )


def fitted(pictures: list[np.ndarray], layout: TokenLayout) -> tuple[np.ndarray, TokenLayout]:
    """Pictures of several sizes on sheets of one: [F, H, W, 3] uint8, and the layout on them.

    A picture of another shape than the largest one lies in the middle of its sheet.
    """
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheets, box = np.full((len(pictures), height, width, 3), 255, np.uint8), layout.box.copy()
    for number, picture in enumerate(pictures):
        scale = min(height / picture.shape[0], width / picture.shape[1])
        rows, columns = (max(1, round(side * scale)) for side in picture.shape[:2])
        top, left = (height - rows) // 2, (width - columns) // 2
        image = Image.fromarray(picture)
        drawn = picture if scale == 1 else np.asarray(image.resize((columns, rows)))
        sheets[number, top : top + rows, left : left + columns] = drawn
        own, sides = layout.frame == number, np.array([columns / width, rows / height])
        box[own] *= np.tile(sides, 2).astype(np.float32)
        box[own, :2] += np.array([left / width, top / height], np.float32)
    return sheets, replace(layout, box=box)


def cells(index: np.ndarray, rows: int, columns: int, newline: bool = False) -> np.ndarray:
    """Boxes [N, 4] of cells numbered row by row over the whole picture; with newline, the last column is beside it."""
    row, column = np.divmod(index, columns)
    wide = columns - newline
    box = np.stack([column / wide, row / rows, np.full(len(index), 1 / wide), np.full(len(index), 1 / rows)], axis=1)
    box[column == wide, 2] = SEPARATOR
    return box.astype(np.float32)


def tiles_layout(side: int, rows: int, columns: int) -> TokenLayout:
    """A LLaVA image: the whole image's side × side patches, then the map of its tiles with a newline a row."""
    base, tiles = cells(np.arange(side**2), side, side), cells(np.arange(rows * columns), rows, columns, newline=True)
    parts = [
        TokenLayout(np.zeros(len(box), np.int32), np.full(len(box), panel, np.uint8), box)
        for panel, box in enumerate((base, tiles))
    ]
    return TokenLayout.join(parts, ("whole image", "tiles"))


def slices_layout(num_frames: int, size: int, queries: int, slices: tuple[int, int]) -> TokenLayout:
    """Frames of `size` tokens of MiniCPM-V: <image> queries </image>, each slice alike, newlines after rows of slices.

    slices: (columns, rows) of the frame's slices, (0, 0) if it is not cut. The queries of an image are drawn as the
    square that the grid takes them for. Markers and newlines stand in a column beside the picture.
    """
    side = math.isqrt(queries)
    columns, rows = slices
    whole = cells(np.arange(queries), side, side)
    box, panel, loose = np.zeros((size, 4), np.float32), np.zeros(size, np.uint8), np.ones(size, bool)
    box[1 : 1 + queries], loose[1 : 1 + queries] = whole, False
    first = 2 + queries
    panel[first:] = 1 if columns else 0
    for number in range(columns * rows):
        row, column = divmod(number, columns)
        begin = first + number * (2 + queries) + row + 1  # a newline between rows of slices
        part = whole * np.tile(np.array([1 / columns, 1 / rows], np.float32), 2)
        part[:, 0] += column / columns
        part[:, 1] += row / rows
        box[begin : begin + queries], loose[begin : begin + queries] = part, False
    for number in range(int(panel.max()) + 1):
        alone = np.flatnonzero(loose & (panel == number))
        box[alone, 0], box[alone, 1] = 1.02, np.arange(len(alone)) * 1.25 * SEPARATOR
        box[alone, 2:] = SEPARATOR
    frame = np.repeat(np.arange(num_frames, dtype=np.int32), size)
    panels = ("whole frame", "slices") if columns else ("",)
    return TokenLayout(frame, np.tile(panel, num_frames), np.tile(box, (num_frames, 1)), panels)
