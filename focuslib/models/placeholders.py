"""From a processor's placeholders to a grid: which of a prompt's tokens show which part of which image or video.

A processor writes a placeholder for each visual token; what it returns beside the token ids says how they lie in rows
and columns. Families differ in few ways, each a function here; a family nobody thought of is read by its numbers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from focuslib.grid import CoordinateGrid, Grid, Run, VisualGrid

Places = Tensor  # [N, 3] int64: frame, row and column of each token of a medium


@dataclass(frozen=True)
class Shown:
    """One image or video of a prompt, as its processor saw it.

    index: its number among those of its kind. frames: of a video; 0 for an image. size: height and width in pixels.
    text: the placeholders and what stands between them. runs: (first, length) of its tokens in the sequence.
    """

    index: int
    frames: int
    size: tuple[int, int]
    text: str
    runs: tuple[Run, ...]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.runs)


def runs_of(rows: Tensor) -> tuple[Run, ...]:
    """The runs of ascending token numbers [N]: (first, length) each."""
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    pieces = rows.tensor_split(breaks)
    return tuple((int(piece[0]), len(piece)) for piece in pieces)


def grid_of(shown: list[Shown], ready: Mapping[str, Any], processor: Any, config: Any) -> tuple[Grid, tuple[int, ...]]:
    """The grid of a prompt's media, in the order of the sequence, and which of them each medium of the grid shows.

    ready: what the processor returned. A picture and its thumbnail, or its tiles where nobody says how they lie, are
    media of their own: their tokens are no neighbours. One medium of equal frames gives a VisualGrid.
    """
    parts: list[Places] = []
    owners: list[int] = []
    for number, medium in enumerate(shown):
        if medium.frames:
            parts += video_places(medium, ready, processor)
        else:
            parts += image_places(medium, ready, processor, config)
        owners += [number] * (len(parts) - len(owners))
    runs = tuple(run for medium in shown for run in medium.runs)
    if len(parts) == 1:
        frames, rows, columns = (int(count) + 1 for count in parts[0].amax(0))
        if torch.equal(parts[0], box(frames, rows, columns)):
            start, length, plane = runs[0][0], len(parts[0]), rows * columns
            return VisualGrid(start, length, frames, rows, columns, plane, columns, runs=runs), (0,)
    coordinates = [(number, *place) for number, places in enumerate(parts) for place in places.tolist()]
    return CoordinateGrid(runs, tuple(coordinates)), tuple(owners)


def video_places(medium: Shown, ready: Mapping[str, Any], processor: Any) -> list[Places]:
    """A video: by its patch grid, less the tokens that a compression left out; else so many equal frames."""
    if (thw := patch_grid("video", medium.index, ready, processor)) is not None:
        places = box(*thw)
        if (kept := _kept(medium.index, ready, processor)) is not None:
            places = places[kept]
        if len(places) == medium.length:
            return [places]
    sizes = {length for _, length in medium.runs}
    for frames in (medium.frames, len(medium.runs) if len(sizes) == 1 else 1):
        if medium.length % frames == 0:
            return [box(frames, *plane(medium.length // frames))]
    return [box(1, 1, medium.length)]


def image_places(medium: Shown, ready: Mapping[str, Any], processor: Any, config: Any) -> list[Places]:
    """An image: by its patch grid, its tiles or its rows; else a square, or one row."""
    thw = patch_grid("image", medium.index, ready, processor)
    if thw is not None and math.prod(thw) == medium.length:
        return [box(*thw)]
    for layout in (_rows_between_breaks, _named_tiles, _unpadded_map, _tiles_of_one_run):
        if (places := layout(medium, processor, config)) is not None:
            return places
    sizes = {length for _, length in medium.runs}
    if len(medium.runs) > 1 and len(sizes) == 1:  # tiles, and nobody says how they lie
        return [box(1, *plane(length)) for _, length in medium.runs]
    return [box(1, *plane(medium.length))]


def box(frames: int, rows: int, columns: int, row: int = 0, column: int = 0) -> Places:
    """All places of equal frames, frame by frame and row by row; row, column: of the first."""
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)
    return places + torch.tensor([0, row, column])


def plane(length: int) -> tuple[int, int]:
    """Rows and columns of so many tokens of which nothing is known: a square, or one row."""
    side = math.isqrt(length)
    return (side, side) if side * side == length else (1, length)


def patch_grid(kind: str, index: int, ready: Mapping[str, Any], processor: Any) -> tuple[int, int, int] | None:
    """Frames, rows and columns of tokens by the processor's grid of patches, if it returns one."""
    grids = ready.get(f"{kind}_grid_thw")
    if grids is None:
        return None
    merge = _merge(kind, index, ready, processor)
    frames, rows, columns = (int(count) for count in grids[index])
    return frames, rows // merge, columns // merge


def _merge(kind: str, index: int, ready: Mapping[str, Any], processor: Any) -> int:
    """Patches a side that one token stands for."""
    sizes = ready.get(f"{kind}_merge_sizes")
    if sizes is not None:
        return int(sizes[index])
    return getattr(getattr(processor, f"{kind}_processor"), "merge_size", 1)


def _kept(index: int, ready: Mapping[str, Any], processor: Any) -> Tensor | None:
    """[T·H·W] bool, which tokens of a video VideoLLaMA 3's compression left; None: nothing was compressed."""
    mask = ready.get("video_compression_mask")
    if mask is None:
        return None
    sizes = []
    for number in range(len(ready["video_grid_thw"])):
        sizes.append(math.prod(patch_grid("video", number, ready, processor) or (0,)))
    return torch.as_tensor(mask).bool().split(sizes)[index]


def _rows_between_breaks(medium: Shown, processor: Any, config: Any) -> list[Places] | None:
    """Pixtral, Mistral 3: a break token after each row."""
    rows, columns = len(medium.runs), medium.runs[0][1]
    breaks = getattr(processor, "image_break_token_id", None) is not None
    return [box(1, rows, columns)] if breaks and rows * columns == medium.length else None


def _named_tiles(medium: Shown, processor: Any, config: Any) -> list[Places] | None:
    """Idefics 3, SmolVLM: each tile's row and column stand before it; the whole image comes last."""
    names = [(int(row) - 1, int(column) - 1) for row, column in re.findall(r"<row_(\d+)_col_(\d+)>", medium.text)]
    sizes = {length for _, length in medium.runs}
    if not names or len(sizes) != 1 or len(medium.runs) - len(names) not in (0, 1):
        return None
    rows, columns = plane(sizes.pop())
    tiles = torch.cat([box(1, rows, columns, row * rows, column * columns) for row, column in names])
    return [tiles, *([box(1, rows, columns)] if len(medium.runs) > len(names) else [])]


def _unpadded_map(medium: Shown, processor: Any, config: Any) -> list[Places] | None:
    """LLaVA-NeXT, LLaVA-OneVision: the whole image, then the unpadded map of its tiles, a newline after each row."""
    pinpoints, vision = getattr(config, "image_grid_pinpoints", None), getattr(config, "vision_config", None)
    if not pinpoints or vision is None or len(medium.runs) > 1:
        return None
    side = vision.image_size // vision.patch_size
    tiles = get_anyres_image_grid_shape(medium.size, pinpoints, vision.image_size)
    whole = torch.empty((1, tiles[0] * side, tiles[1] * side), device="meta")
    _, rows, columns = unpad_image(whole, medium.size).shape
    largest = int(str(getattr(config, "vision_aspect_ratio", "anyres_max_0")).removeprefix("anyres_max_"))
    if largest and (ratio := math.sqrt(rows * columns / (largest * side**2))) > 1.1:  # the model shrinks larger maps
        rows, columns = int(rows // ratio), int(columns // ratio)
    if side**2 + rows * (columns + 1) != medium.length:
        return None
    return [box(1, side, side), box(1, rows, columns + 1)]


def _tiles_of_one_run(medium: Shown, processor: Any, config: Any) -> list[Places] | None:
    """InternVL and its like: square tiles one after another, the whole image last where there are several."""
    tile = next(
        (size for name in ("image_seq_length", "image_seq_len") if (size := getattr(processor, name, None))), None
    )
    side = math.isqrt(tile or 0)
    if not tile or side * side != tile or len(medium.runs) > 1 or medium.length % tile or medium.length == tile:
        return None
    count = medium.length // tile - 1
    height, width = medium.size
    rows = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(count // n / n - width / height))
    columns = count // rows
    tiles = [box(1, side, side, row * side, column * side) for row in range(rows) for column in range(columns)]
    return [torch.cat(tiles), box(1, side, side)]
