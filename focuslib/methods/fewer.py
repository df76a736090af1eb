"""Controls that give the model less of the media: fewer frames, or a coarser picture of each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslib.kernels.ranking import evenly_spaced
from focuslib.methods.budget import check_choice
from focuslib.methods.controls import Control
from focuslib.methods.frames import frame_shapes, frame_sizes, newlines, require_frames
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class _Fewer(Control):
    """What the two share. positions: "renumbered" as if nothing else had been given, or "original"."""

    positions: str = "renumbered"

    def __post_init__(self):
        super().__post_init__()
        check_choice(self.name, "positions", self.positions, "original", usual="renumbered")


@dataclass(frozen=True)
class FewerFrames(_Fewer):
    """Fewer frames, evenly spaced, as if they alone had been sampled: the tokens of the others leave.

    One frame more is thinned evenly to meet the number of tokens. Acts after the tower, which for towers that see one
    frame at a time is the same. retention, target_sparsity: see Control. positions: "renumbered" (they stay where they
    have several axes), or "original".
    """

    name: ClassVar[str] = "fewer_frames"
    needs_all: ClassVar[str] = "first"

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer == 0:
            require_frames(self.name, prefill.grid)
            prefill.renumber(self.positions == "renumbered")
        return super().before_attention(prefill, layer, hidden)

    def choose(self, prefill: Prefill, hidden: Tensor, keep: int) -> Tensor:
        sizes = torch.tensor([size for sizes in frame_sizes(self.name, prefill.grid) for size in sizes])
        first = sizes.cumsum(0) - sizes
        count = next(n for n in range(1, len(sizes) + 1) if int(sizes[evenly_spaced(len(sizes), n)].sum()) >= keep)
        chosen, numbers = evenly_spaced(len(sizes), count), []
        for place, frame in enumerate(chosen.tolist()):
            last = place == count // 2  # the frame that is thinned
            size = int(sizes[frame])
            left = size - (int(sizes[chosen].sum()) - keep) if last else size
            numbers.append(first[frame] + evenly_spaced(size, max(left, 0)))
        return torch.cat(numbers)


@dataclass(frozen=True)
class FewerPixels(_Fewer):
    """A coarser grid of tokens a frame, each the mean of those that it covers, as if the pictures were smaller.

    The sides of the grids change from frame to frame to meet the number of tokens. Acts after the tower, whose pictures
    have one size in most models. Newline tokens of rows that vanish leave. retention, target_sparsity: see Control.
    positions: "renumbered" (they stay where they have several axes), or "original": each mean stands where one of the
    tokens that it covers stood.
    """

    name: ClassVar[str] = "fewer_pixels"
    needs_all: ClassVar[str] = "first"

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        x = hidden[prefill.visual]
        keep, blank = self.keep(prefill), newlines(x, prefill.grid)
        before, x, first, used, numbers = x, x.clone(), 0, 0, []
        shapes = frame_shapes(self.name, prefill.grid)
        for done, (rows, columns) in enumerate(shapes, 1):
            size, separator = rows * columns, int(blank[first + columns - 1])
            grid = nearest_grid(rows, columns - separator, separator, round(keep * done / len(shapes)) - used)
            frame, seen = (whole[first : first + size].view(rows, columns, -1) for whole in (x, before))
            number = first + torch.arange(size, device=x.device).view(rows, columns)
            place = [
                evenly_spaced(side, n).to(x.device) for side, n in zip((rows, columns - separator), grid, strict=True)
            ]
            pooled = F.adaptive_avg_pool2d(seen[:, : columns - separator].permute(2, 0, 1).float(), grid)
            frame[place[0][:, None], place[1]] = pooled.permute(1, 2, 0).to(x.dtype)
            kept = number[place[0]]
            numbers.append(torch.cat([kept[:, place[1]], kept[:, columns - separator :]], 1).flatten())
            used += numbers[-1].numel()
            first += size
        hidden = hidden.clone()
        hidden[prefill.visual] = x
        prefill.renumber(self.positions == "renumbered")
        return hidden, prefill.keep(torch.cat(numbers))


def nearest_grid(rows: int, columns: int, separator: int, wanted: int) -> tuple[int, int]:
    """The sides of the grid, of about the frame's shape, whose tokens with a separator a row are nearest `wanted`."""
    sides = [(r, c) for r in range(1, rows + 1) for c in {r * columns // rows, -(-r * columns // rows)} if c]
    return min(sides, key=lambda side: (abs(side[0] * (side[1] + separator) - wanted), side))
