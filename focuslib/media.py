"""Videos from files: which frames a model samples, and their pixels."""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from focuslib.errors import UserError


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a model sees.

    max_frames: the most frames taken; beyond it they are spread evenly from the first to the last.
    per_second: candidates are taken at this rate (every round(fps / per_second)-th frame) and spread only if there are
        more than max_frames. None: always max_frames, spread evenly (a shorter video repeats frames).
    """

    max_frames: int
    per_second: float | None = None

    def indices(self, total: int, fps: float) -> list[int]:
        """Frame numbers to take from a video of `total` frames at `fps` frames a second."""
        if self.per_second is not None:
            candidates = list(range(0, total, max(1, round(fps / self.per_second))))
            if len(candidates) <= self.max_frames:
                return candidates
        return np.linspace(0, total - 1, self.max_frames, dtype=int).tolist()


def read_video(path: str | Path, sampling: FrameSampling) -> np.ndarray:
    """The sampled frames of a video file: [F, H, W, 3] uint8 RGB. Raises UserError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such video file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            total = sum(packet.pts is not None for packet in container.demux(stream))
            fps = float(stream.average_rate or stream.guessed_rate or 1)
        if total == 0:
            raise UserError(f"{path}: has no frames")
        wanted = sampling.indices(total, fps)
        frames = _decode(path, set(wanted))
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable video ({error})") from error
    if not frames:
        raise UserError(f"{path}: no frame could be decoded")
    if max(wanted) not in frames:  # containers may announce more frames than they hold
        raise UserError(f"{path}: truncated, {total} frames announced and {max(frames) + 1} decoded")
    return np.stack([frames[index] for index in wanted])


def _decode(path: Path, wanted: set[int]) -> dict[int, np.ndarray]:
    """Frame number → pixels of the wanted frames."""
    frames = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames[index] = frame.to_ndarray(format="rgb24")
                if len(frames) == len(wanted):
                    break
    return frames
