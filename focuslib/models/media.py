"""Videos and images from files: which frames a model samples, and their pixels as 8-bit RGB."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from PIL import Image, ImageFile, ImageOps

from focuslib.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FOLDER_FPS = 3.0  # frames a second of a folder of frames: that of MVBench's, the only published data set with folders


@dataclass(frozen=True)
class Clip:
    """The sampled frames of a video, and when they are shown.

    frames: [F, H, W, 3] uint8. times: seconds from the video's start, ascending. duration: of the whole video, seconds.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    duration: float


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a model sees.

    Attributes
    ----------
    max_frames
        The most frames taken; beyond it they are spread evenly from the first to the last.
    per_second
        Candidates are taken at this rate (every round(fps / per_second)-th frame) and spread only if there are more
        than max_frames. None: always max_frames, spread evenly (a shorter video repeats frames).
    centred
        Spread over the candidates, each in the middle of its share of them, instead of from first to last frame.
    """

    max_frames: int
    per_second: float | None = None
    centred: bool = False

    def changed(self, frames: int | None = None, fps: float | None = None) -> "FrameSampling":
        """The same with another number of frames or rate. Raises UserError if one is not above 0."""
        for name, value in (("frames", frames), ("fps", fps)):
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}; it must be above 0")
        changes = {"max_frames": frames, "per_second": fps}
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def indices(self, total: int, fps: float) -> list[int]:
        """Frame numbers to take from a video of `total` frames at `fps` frames a second, ascending."""
        candidates = list(range(total))
        if self.per_second is not None:
            candidates = candidates[:: max(1, round(fps / self.per_second))]
            if len(candidates) <= self.max_frames:
                return candidates
        if self.centred:
            gap = len(candidates) / self.max_frames
            return [candidates[int(i * gap + gap / 2)] for i in range(self.max_frames)]
        return np.linspace(0, total - 1, self.max_frames, dtype=int).tolist()


def is_image_file(path: str | Path) -> bool:
    """Whether a file's name says that it is an image (a .gif too: its first frame)."""
    path = Path(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()


def read_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB. Raises UserError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such image file")
    with readable_images(path), Image.open(path) as image:
        return to_rgb(image)


@contextmanager
def readable_images(name: str | Path) -> Iterator[None]:
    """Turn what Pillow raises for a bad image into a UserError that names it.

    A cut-off image is one too: importing lmms-eval makes Pillow fill it up with grey.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({_one_line(error)})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB: upright (EXIF), an animation's first frame, white for transparency, 16 bits scaled."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError("an image of floating-point pixels has no known range; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def blank(medium: Image.Image | Clip) -> Image.Image | Clip:
    """An image, or a clip, of the same size and times in which all is grey."""
    if isinstance(medium, Clip):
        return replace(medium, frames=np.full_like(medium.frames, 128))
    return Image.new("RGB", medium.size, (128, 128, 128))


def read_video(path: str | Path, sampling: FrameSampling) -> np.ndarray:
    """The frames of `read_clip`: [F, H, W, 3] uint8."""
    return read_clip(path, sampling).frames


def read_clip(path: str | Path, sampling: FrameSampling) -> Clip:
    """The sampled frames of a video file, or of a folder of frames in the order of their names, with their times.

    The frames are RGB, upright. Decodes only what lies between a wanted frame and the key frame before it, and keeps
    only wanted frames. Raises UserError if the video cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, sampling)
    if not path.is_file():
        raise UserError(f"{path}: no such video file")
    with _one_line_errors(path):
        listing = _list_packets(path)
        wanted = sampling.indices(len(listing.times), listing.fps)
        frames = _decode_seeking(path, listing, sorted(set(wanted)))
        if frames is None:
            frames = _decode_all(path, set(wanted))
    if not frames:
        raise UserError(f"{path}: no frame could be decoded")
    if not set(wanted) <= frames.keys():
        total = len(listing.times)
        raise UserError(f"{path}: truncated, {total} frames announced and {max(frames) + 1} decoded")
    pixels = _stack(path, [frames[index] for index in wanted])
    return Clip(pixels, tuple(listing.seconds(index) for index in wanted), listing.duration)


def _read_folder(path: Path, sampling: FrameSampling) -> Clip:
    files = sorted(file for file in path.iterdir() if is_image_file(file))
    if not files:
        raise UserError(f"{path}: a folder without image files")
    wanted = sampling.indices(len(files), FOLDER_FPS)
    pixels = _stack(path, [np.asarray(read_image(files[i])) for i in wanted])
    return Clip(pixels, tuple(index / FOLDER_FPS for index in wanted), len(files) / FOLDER_FPS)


def _stack(path: Path, frames: list[np.ndarray]) -> np.ndarray:
    sizes = sorted({frame.shape[1::-1] for frame in frames})
    if len(sizes) > 1:
        raise UserError(f"{path}: frames of different sizes ({sizes[0]} and {sizes[1]}); a video has one size")
    return np.stack(frames)


@dataclass
class _Packets:
    """What a video file holds, without decoding: display times in stream units, in order, and those of key frames.

    unit: seconds of a stream unit; None: the file has no times, and they are counted in frames.
    """

    times: list[int]
    key_times: list[int]
    fps: float
    seekable: bool
    unit: float | None

    def seconds(self, index: int) -> float:
        """When a frame is shown, from the first one."""
        return (self.times[index] - self.times[0]) * (self.unit or 1 / self.fps)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.seconds(-1) + 1 / self.fps


def _video_stream(container: InputContainer) -> av.VideoStream:
    """The stream that holds the film, not a cover picture. Raises UserError if there is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise UserError(f"{container.name}: has no video stream")
    return stream


def _decoded(stream: av.VideoStream) -> av.VideoStream:
    """A stream that is decoded by as many threads as torch has, of which a worker among several has its share."""
    stream.codec_context.thread_count = torch.get_num_threads()
    stream.thread_type = "AUTO"
    return stream


def _list_packets(path: Path) -> _Packets:
    times: list[int] = []
    key_times: list[int] = []
    count = without_time = cut = 0
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        announced, fps = stream.frames, float(stream.average_rate or stream.guessed_rate or 1)
        unit = float(stream.time_base) if stream.time_base else None
        for packet in container.demux(stream):
            if packet.dts is None and packet.size == 0:  # the flush packet at the end
                continue
            count += 1
            if packet.size == 0:  # "as before", in AVI files
                continue
            cut += packet.is_corrupt
            if packet.is_discard:  # outside the edit list: decoded, never shown
                continue
            if packet.pts is None:
                without_time += 1
                continue
            times.append(packet.pts)
            if packet.is_keyframe:
                key_times.append(packet.pts)
    if count == 0:
        raise UserError(f"{path}: has no frames")
    if count - cut < announced:
        raise UserError(f"{path}: truncated, {announced} frames announced and {count - cut} found whole")
    if without_time:
        return _Packets(list(range(len(times) + without_time)), [], fps, False, None)
    times.sort()
    key_times.sort()
    seekable = bool(key_times) and key_times[0] == times[0] and len(set(times)) == len(times)
    return _Packets(times, key_times, fps, seekable, unit)


def _decode_seeking(path: Path, packets: _Packets, wanted: list[int]) -> dict[int, np.ndarray] | None:
    """Frame number → pixels of the wanted frames (ascending); None if the file cannot be sought in exactly."""
    if not packets.seekable:
        return None
    frames: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = _decoded(_video_stream(container))
        decoder: Iterator[av.VideoFrame] = container.decode(stream)
        position = packets.times[0]  # display time of the frame that the decoder gives next, or an earlier one
        for index in wanted:
            target = packets.times[index]
            key = packets.key_times[bisect_right(packets.key_times, target) - 1]
            if key > position:
                container.seek(key, stream=stream)
                decoder = container.decode(stream)
            frame = next((frame for frame in decoder if frame.pts is None or frame.pts >= target), None)
            if frame is None or frame.pts != target:
                return None
            frames[index] = _upright(frame)
            position = target
    return frames


def _decode_all(path: Path, wanted: set[int]) -> dict[int, np.ndarray]:
    """Frame number → pixels of the wanted frames, decoding from the start to the last of them."""
    frames = {}
    with av.open(str(path)) as container:
        stream = _decoded(_video_stream(container))
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames[index] = _upright(frame)
                if len(frames) == len(wanted):
                    break
    return frames


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """A frame's pixels [H, W, 3] uint8, turned by the display matrix (quarter turns, counterclockwise degrees)."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn a decoder's exception into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (FFmpegError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable video ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
