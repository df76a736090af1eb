"""Where a prompt's visual tokens sit, and which tokens are neighbours in space and time."""

from dataclasses import asdict, dataclass
from itertools import product


@dataclass(frozen=True)
class VisualGrid:
    """The contiguous run of visual tokens in the LLM's input, seen as frames of rows and columns.

    Visual token p (0 … length − 1) has its neighbour at offset (df, dh, dw) at
    p − df·frame_stride − dh·height_stride − dw·width_stride. Strides, not shapes, define the neighbourhood, so
    newline columns and separators need no special case.

    start: index of the first visual token in the sequence.
    length: S, the number of visual tokens.
    num_frames, height, width: caps of the block size along each axis, in tokens.
    """

    start: int
    length: int
    num_frames: int
    height: int
    width: int
    frame_stride: int
    height_stride: int
    width_stride: int = 1

    def __post_init__(self):
        for name, least in (("start", 0), ("length", 1), ("num_frames", 1), ("height", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"VisualGrid.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("frame_stride", "height_stride", "width_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"VisualGrid.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def stop(self) -> int:
        """Index of the first token after the visual run."""
        return self.start + self.length

    def block_offsets(self, frames: int, side: int) -> list[int]:
        """Distances p − q of the candidates of a (frames × side × side) block, frame offset slowest, self excluded.

        The block is capped by the grid's frame count, height and width (paper, similarity concentration).
        """
        ranges = (min(frames, self.num_frames), min(side, self.height), min(side, self.width))
        return [
            df * self.frame_stride + dh * self.height_stride + dw * self.width_stride
            for df, dh, dw in product(*map(range, ranges))
            if (df, dh, dw) != (0, 0, 0)
        ]

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

    def to_dict(self) -> dict[str, int]:
        """The grid as plain integers, for files."""
        return asdict(self)
