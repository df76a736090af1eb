"""Where a prompt's visual tokens sit, and which tokens are neighbours in space and time.

Visual tokens are numbered 0 … S − 1 in the order of the sequence. They sit in one or more runs; what stands between two
runs (timestamps, frame names, markers, other text) is no visual token: methods never drop, merge or count it.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

Run = tuple[int, int]  # index of a run's first token in the sequence, number of its tokens


class Grid(ABC):
    """What both kinds of grid say; the strided one (VisualGrid) and the one of explicit coordinates (CoordinateGrid).

    start: index of the first visual token in the sequence. length: S, the number of visual tokens.
    spans: (first, length) of each run, ascending. num_frames: frames of the longest medium.
    """

    start: int
    length: int
    num_frames: int
    spans: tuple[Run, ...]

    @property
    def stop(self) -> int:
        """Index of the first token after the last run."""
        return sum(self.spans[-1])

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Where each visual token stands in the sequence: [S] int64, ascending."""
        return torch.cat([torch.arange(first, first + length, device=device) for first, length in self.spans])

    @abstractmethod
    def block_sides(self, frames: int, side: int) -> tuple[int, int, int]:
        """Frames, rows and columns of a (frames × side × side) block, capped by those that the grid has."""

    def block_places(self, frames: int, side: int) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) back of each candidate of a block, itself excluded; the frames are slowest.

        Paper, similarity concentration.
        """
        df, dh, dw = map(range, self.block_sides(frames, side))
        return [place for place in product(df, dh, dw) if any(place)]

    @abstractmethod
    def candidates(self, positions: Tensor, frames: int, side: int) -> Tensor:
        """Numbers of the candidates of tokens, in the order of `block_places`: [T] → [C, T] int64, < 0 if none."""

    @property
    @abstractmethod
    def media(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of tokens of each medium's frames, in order: an image has one frame."""

    @property
    @abstractmethod
    def one_picture(self) -> bool:
        """Whether no medium has more than one frame."""

    def frame_of(self) -> Tensor:
        """Which frame of its medium each visual token belongs to: [S] int64."""
        frames = [torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) for sizes in self.media]
        return torch.cat(frames)

    @abstractmethod
    def medium_of(self) -> Tensor:
        """Which medium each visual token belongs to: [S] int64."""

    @abstractmethod
    def places(self) -> Tensor:
        """[S] int64, equal for tokens of the same place in different frames of one medium, and for no others."""

    @abstractmethod
    def above_and_left(self) -> tuple[Tensor, Tensor]:
        """Numbers of the tokens one row above and one column to the left: [S] int64 each, < 0 where there is none."""

    @abstractmethod
    def inner(self) -> Tensor:
        """[S] bool: tokens that are in no first row, no first column, and no first frame of several."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The grid as plain values, for files (see `grid_from_dict`)."""


@dataclass(frozen=True)
class VisualGrid(Grid):
    """One video or image, seen as equal frames of rows and columns.

    Visual token p has its neighbour at offset (df, dh, dw) at p − df·frame_stride − dh·height_stride − dw·width_stride.
    Strides, not shapes, define the neighbourhood, so newline columns need no special case; they count visual tokens
    only, whatever stands between two runs.

    start: index of the first visual token in the sequence.
    length: S, the number of visual tokens.
    num_frames, height, width: caps of the block size along each axis, in tokens.
    runs: (first, length) of each run of visual tokens where they are several; none: one run from start.
    """

    start: int
    length: int
    num_frames: int
    height: int
    width: int
    frame_stride: int
    height_stride: int
    width_stride: int = 1
    runs: tuple[Run, ...] = ()

    def __post_init__(self):
        for name, least in (("start", 0), ("length", 1), ("num_frames", 1), ("height", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"VisualGrid.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("frame_stride", "height_stride", "width_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"VisualGrid.{name} is {getattr(self, name)}; it must be at least 1")
        runs = tuple((int(first), int(length)) for first, length in self.runs)
        if runs:
            _check_runs("VisualGrid", runs, self.length)
            if runs[0][0] != self.start:
                raise ValueError(f"VisualGrid.start is {self.start}; its first run starts at {runs[0][0]}")
        object.__setattr__(self, "runs", runs if len(runs) > 1 else ())

    @property
    def spans(self) -> tuple[Run, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.runs or ((self.start, self.length),)

    def block_offsets(self, frames: int, side: int) -> list[int]:
        """Distances p − q of the candidates of a block, in the order of `block_places`."""
        return [
            df * self.frame_stride + dh * self.height_stride + dw * self.width_stride
            for df, dh, dw in self.block_places(frames, side)
        ]

    def block_sides(self, frames: int, side: int) -> tuple[int, int, int]:
        return min(frames, self.num_frames), min(side, self.height), min(side, self.width)

    def candidates(self, positions: Tensor, frames: int, side: int) -> Tensor:
        offsets = torch.tensor(self.block_offsets(frames, side), dtype=torch.long, device=positions.device)
        return positions - offsets[:, None]

    @property
    def frame_size(self) -> int:
        """Tokens a frame, separators included.

        A frame is never smaller than its rows: the published grid of LLaVA images has a frame stride that only serves
        the neighbourhood of Focus.
        """
        return max(self.frame_stride, self.height * self.height_stride)

    @property
    def one_picture(self) -> bool:
        """Whether the media is one picture, whatever num_frames says.

        The published grid of LLaVA images claims as many frames as video frames of tokens would fit; its frame stride
        is shorter than its rows together, which no video's is.
        """
        return self.num_frames == 1 or self.frame_stride < self.height * self.height_stride

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of each frame of a video, for the methods that compare whole frames.

        Not the frame stride: the published grid of MiniCPM-V always has that of a frame cut into slices.
        """
        return self.length // self.num_frames

    @property
    def media(self) -> tuple[tuple[int, ...], ...]:
        if self.one_picture:
            return ((self.length,),)
        if self.length % self.num_frames:
            raise ValueError(f"{self.length} visual tokens are not {self.num_frames} equal frames")
        return ((self.tokens_per_frame,) * self.num_frames,)

    def medium_of(self) -> Tensor:
        return torch.zeros(self.length, dtype=torch.long)

    def places(self) -> Tensor:
        return torch.arange(self.length) % self.tokens_per_frame

    def above_and_left(self) -> tuple[Tensor, Tensor]:
        position = torch.arange(self.length)
        return position - self.height_stride, position - self.width_stride

    def inner(self) -> Tensor:
        """Published: the first `frame_stride` tokens of a video, also where that is more than a frame (MiniCPM-V)."""
        position = torch.arange(self.length)
        within = position % self.frame_size
        inner = (within >= self.height_stride) & (within % self.height_stride >= self.width_stride)
        return inner if self.one_picture else inner & (position >= self.frame_stride)

    def to_dict(self) -> dict[str, Any]:
        """The grid as plain values, for files; the runs only where there are several."""
        values = asdict(self)
        if not self.runs:
            del values["runs"]
        return values


@dataclass(frozen=True)
class CoordinateGrid(Grid):
    """Any media: unequal frames, tiles, several images and videos in one prompt, each token with its coordinates.

    A token's neighbour at offset (df, dh, dw) is the token of the same medium at (frame − df, row − dh, column − dw),
    if there is one; tokens of different media are never neighbours.

    runs: (first, length) of each run of visual tokens, ascending.
    coordinates: (medium, frame, row, column) of each of the S visual tokens; media and frames ascending.

    Raises ValueError if the runs overlap or do not hold S tokens, or if the coordinates are out of order or not unique.
    """

    runs: tuple[Run, ...]
    coordinates: tuple[tuple[int, int, int, int], ...]

    def __post_init__(self):
        object.__setattr__(self, "runs", tuple((int(first), int(length)) for first, length in self.runs))
        object.__setattr__(self, "coordinates", tuple(tuple(map(int, place)) for place in self.coordinates))
        _check_runs("CoordinateGrid", self.runs, len(self.coordinates))
        if any(len(place) != 4 or min(place) < 0 for place in self.coordinates):
            raise ValueError("CoordinateGrid.coordinates: four numbers from 0 a token: medium, frame, row, column")
        frames = [place[:2] for place in self.coordinates]
        if frames != sorted(frames) or len(set(self.coordinates)) != len(self.coordinates):
            raise ValueError("CoordinateGrid.coordinates: frames must ascend, and no place may occur twice")

    @property
    def spans(self) -> tuple[Run, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.runs

    @property
    def start(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  as VisualGrid's field
        return self.runs[0][0]

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.coordinates)

    @property
    def num_frames(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(map(len, self.media))

    def block_sides(self, frames: int, side: int) -> tuple[int, int, int]:
        height, width = (1 + max(place[axis] for place in self.coordinates) for axis in (2, 3))
        return min(frames, self.num_frames), min(side, height), min(side, width)

    def candidates(self, positions: Tensor, frames: int, side: int) -> Tensor:
        if (frames, side) not in self._tables:
            places = self.block_places(frames, side)
            none = torch.empty((0, self.length), dtype=torch.long)
            self._tables[frames, side] = torch.stack([self._back(*place) for place in places]) if places else none
        return self._tables[frames, side].to(positions.device)[:, positions]

    @cached_property
    def _tables(self) -> dict[tuple[int, int], Tensor]:
        """The candidates of all tokens, [C, S] int64, for the blocks that were asked for."""
        return {}

    def _back(self, frames: int, rows: int, columns: int) -> Tensor:
        """Number of the token so many frames, rows and columns back, −1 if none: [S] int64."""
        number = self._numbers
        return torch.tensor([
            number.get((medium, frame - frames, row - rows, column - columns), -1)
            for medium, frame, row, column in self.coordinates
        ])  # fmt: skip

    @cached_property
    def _numbers(self) -> dict[tuple[int, int, int, int], int]:
        return {place: number for number, place in enumerate(self.coordinates)}

    @cached_property
    def media(self) -> tuple[tuple[int, ...], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        sizes: dict[int, dict[int, int]] = {}
        for medium, frame, *_ in self.coordinates:
            frames = sizes.setdefault(medium, {})
            frames[frame] = frames.get(frame, 0) + 1
        return tuple(tuple(frames.values()) for frames in sizes.values())

    @property
    def one_picture(self) -> bool:
        return self.num_frames == 1

    def medium_of(self) -> Tensor:
        return torch.tensor([place[0] for place in self.coordinates])

    def places(self) -> Tensor:
        return self._places

    @cached_property
    def _places(self) -> Tensor:
        numbers: dict[tuple[int, int, int], int] = {}
        return torch.tensor([
            numbers.setdefault((medium, row, column), len(numbers)) for medium, _, row, column in self.coordinates
        ])  # fmt: skip

    def above_and_left(self) -> tuple[Tensor, Tensor]:
        return self._above_and_left

    @cached_property
    def _above_and_left(self) -> tuple[Tensor, Tensor]:
        return self._back(0, 1, 0), self._back(0, 0, 1)

    def inner(self) -> Tensor:
        return self._inner

    @cached_property
    def _inner(self) -> Tensor:
        above, left = self.above_and_left()
        first = {}  # of each medium of several frames: its first frame
        for medium, frame, *_ in self.coordinates:
            first.setdefault(medium, frame)
        several = [len(frames) > 1 for frames in self.media]
        index = {medium: number for number, medium in enumerate(first)}
        later = torch.tensor([
            not several[index[medium]] or frame > first[medium] for medium, frame, *_ in self.coordinates
        ])  # fmt: skip
        return (above >= 0) & (left >= 0) & later

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def grid_from_dict(values: dict[str, Any]) -> Grid:
    """The grid of `Grid.to_dict`. Raises ValueError or TypeError for values that are none."""
    return CoordinateGrid(**values) if "coordinates" in values else VisualGrid(**values)


def _check_runs(name: str, runs: tuple[Run, ...], length: int) -> None:
    if not runs or any(first < 0 or size < 1 for first, size in runs):
        raise ValueError(f"{name}.runs is {runs}; give (first, length) of each run, lengths from 1")
    if any(first < sum(before) for before, (first, _) in pairwise(runs)):
        raise ValueError(f"{name}.runs must ascend and not overlap; they are {runs}")
    if sum(size for _, size in runs) != length:
        raise ValueError(f"{name}.runs hold {sum(size for _, size in runs)} tokens; there are {length} visual tokens")
