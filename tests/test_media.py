"""Frame sampling as published, and videos and images of every awkward kind, made here."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from focuslib.errors import UserError
from focuslib.models import LlavaOnevision, LlavaVideo, MiniCPMV, media
from focuslib.models.media import FrameSampling, is_image_file, read_image, read_video, to_rgb

ALL = FrameSampling(max_frames=1000, per_second=1000)
SIZE = (64, 48)  # width, height


def shade(index: int, count: int) -> int:
    """The grey level of a test video's frame: it says which frame it is."""
    return 16 + 220 * index // max(1, count - 1)


def write_video(path: Path, count=24, fps=8, size=SIZE, times=None, codec="libx264", gop=6) -> Path:
    """A video whose frames are grey levels, brighter from frame to frame, with a white top left corner."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, fps)
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), shade(index, count), np.uint8)
            pixels[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def which(frames: np.ndarray, count: int) -> list[int]:
    """Which frames of a test video these are."""
    levels = frames[:, frames.shape[1] // 2, frames.shape[2] // 2].mean(1)
    return [int(np.abs(level - np.array([shade(i, count) for i in range(count)])).argmin()) for level in levels]


@pytest.mark.parametrize(("total", "fps"), [(300, 29.97), (1917, 30.0), (1951, 30.0), (90000, 25.0), (5, 0.4)])
def test_published_sampling(total, fps):
    step = max(1, round(fps))
    candidates = list(range(0, total, step))
    few = len(candidates) <= 64
    assert LlavaOnevision.default_sampling.indices(total, fps) == np.linspace(0, total - 1, 32, dtype=int).tolist()
    spread = np.linspace(0, total - 1, 64, dtype=int).tolist()
    assert LlavaVideo.default_sampling.indices(total, fps) == (candidates if few else spread)
    gap = len(candidates) / 64
    centred = [candidates[int(i * gap + gap / 2)] for i in range(64)]
    assert MiniCPMV.default_sampling.indices(total, fps) == (candidates if few else centred)


CODECS = {"a.mp4": "libx264", "a.mkv": "libx264", "a.webm": "libvpx", "a.avi": "mpeg4", "a.ts": "mpeg2video"}


@pytest.mark.parametrize("name", CODECS)
def test_every_container(tmp_path, name):
    path = write_video(tmp_path / name, count=24, fps=25, codec=CODECS[name])
    for sampling in (ALL, FrameSampling(5), FrameSampling(3, per_second=10, centred=True)):
        wanted = sampling.indices(24, 25)
        frames = read_video(path, sampling)
        assert frames.shape == (len(wanted), SIZE[1], SIZE[0], 3) and frames.dtype == np.uint8
        assert which(frames, 24) == wanted


@pytest.mark.parametrize("name", CODECS)
def test_seeking_and_decoding_everything_agree(tmp_path, name, monkeypatch):
    path = write_video(tmp_path / name, count=60, fps=25, codec=CODECS[name], gop=7)
    sampling = FrameSampling(9)
    fast = read_video(path, sampling)
    monkeypatch.setattr(media, "_decode_seeking", lambda *args: None)
    assert np.array_equal(fast, read_video(path, sampling))


def test_a_long_video_is_not_decoded_from_the_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", count=100, gop=10)
    everything = read_video(path, ALL)
    kept = []
    upright = media._upright
    monkeypatch.setattr(media, "_decode_all", None)  # seeking is enough
    monkeypatch.setattr(media, "_upright", lambda frame: kept.append(frame) or upright(frame))
    assert np.array_equal(read_video(path, FrameSampling(3)), everything[[0, 49, 99]])
    assert len(kept) == 3


def test_variable_frame_rate(tmp_path):
    times = [0, 1, 2, 3, 10, 20, 30, 31, 32, 33, 60, 90]
    path = write_video(tmp_path / "a.mp4", count=12, times=times)
    assert which(read_video(path, FrameSampling(12)), 12) == list(range(12))
    assert which(read_video(path, FrameSampling(4)), 12) == [0, 3, 7, 11]


def test_fewer_frames_than_asked(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=3)
    assert which(read_video(path, FrameSampling(8)), 3) == np.linspace(0, 2, 8, dtype=int).tolist()
    assert which(read_video(path, FrameSampling(8, per_second=8)), 3) == [0, 1, 2]
    assert len(read_video(write_video(tmp_path / "b.mp4", count=1), FrameSampling(4))) == 4


def test_portrait(tmp_path):
    path = write_video(tmp_path / "a.mp4", size=(48, 64))
    assert read_video(path, FrameSampling(2)).shape == (2, 64, 48, 3)


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_display_matrix(tmp_path, degrees, corner):
    """A phone's portrait video is stored lying, with a matrix that says how to turn it (clockwise)."""
    path = write_video(tmp_path / "a.mp4")
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4  # version and flags, 20 bytes of times and numbers, 16 more, then the matrix
    content[header + 40 : header + 76] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    frame = read_video(path, FrameSampling(1))[0]
    assert frame.shape == ((SIZE[1], SIZE[0], 3) if degrees % 180 == 0 else (SIZE[0], SIZE[1], 3))
    rows, columns = ([4, -5][-i] for i in corner)
    assert frame[rows, columns].min() > 200
    assert frame[-rows, -columns].max() < 60


def test_folder_of_frames(tmp_path):
    for index in range(10):
        Image.new("RGB", SIZE, (shade(index, 10),) * 3).save(tmp_path / f"{index:05}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert which(read_video(tmp_path, FrameSampling(64, per_second=1)), 10) == [0, 3, 6, 9]  # three frames a second
    assert which(read_video(tmp_path, FrameSampling(4)), 10) == [0, 3, 6, 9]


def test_folders_that_are_no_video(tmp_path):
    with pytest.raises(UserError, match="without image files"):
        read_video(tmp_path, FrameSampling(2))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="different sizes"):
        read_video(tmp_path, FrameSampling(2))


def no_frames(path: Path) -> None:
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        container.start_encoding()


def sound_only(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


def cut(share: float):
    def make(path: Path) -> None:
        """The index first, as in streamed files, then only a part of the frames."""
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            rng = np.random.default_rng(0)
            for _ in range(30):
                noise = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            container.mux(stream.encode())
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "text": lambda path: path.write_text("not found"),
    "no frames": no_frames,
    "sound only": sound_only,
    "cut in half": cut(0.5),
    "cut in the index": cut(0.02),
    "last frame cut": cut(0.99),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_videos_are_named_in_one_line(tmp_path, kind):
    path = tmp_path / "broken.mp4"
    BROKEN[kind](path)
    with pytest.raises(UserError) as caught:
        read_video(path, FrameSampling(32))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"a\.mp4: no such video file"):
        read_video(tmp_path / "a.mp4", FrameSampling(2))
    with pytest.raises(UserError, match=r"a\.png: no such image file"):
        read_image(tmp_path / "a.png")


GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=2)


def close_to(image: Image.Image, expected: np.ndarray, tolerance: int = 1) -> bool:
    assert image.mode == "RGB"
    return np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance


def test_grey_images(tmp_path):
    expected = np.repeat(GREY[:, :, None], 3, axis=2)
    Image.fromarray(GREY).save(tmp_path / "8.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "16.tiff")
    for name in ("8.png", "16.png", "16.tiff"):
        assert close_to(read_image(tmp_path / name), expected)
    Image.fromarray(GREY > 100).save(tmp_path / "1.png")
    assert set(np.unique(np.asarray(read_image(tmp_path / "1.png")))) == {0, 255}


def test_colour_images(tmp_path):
    colour = Image.fromarray(COLOUR)
    colour.save(tmp_path / "rgb.png")
    assert close_to(read_image(tmp_path / "rgb.png"), COLOUR, 0)
    colour.convert("CMYK").save(tmp_path / "cmyk.tiff")
    assert close_to(read_image(tmp_path / "cmyk.tiff"), COLOUR, 2)
    colour.quantize(64).save(tmp_path / "palette.png")
    assert close_to(read_image(tmp_path / "palette.png"), COLOUR, 80)


def test_transparency_is_white(tmp_path):
    rgba = np.dstack([COLOUR, np.full((8, 8), 255, np.uint8)])
    rgba[:4, :, 3] = 0
    expected = COLOUR.copy()
    expected[:4] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert close_to(read_image(tmp_path / "a.png"), expected)
    grey = Image.fromarray(np.dstack([GREY, rgba[:, :, 3]]), "LA")
    assert np.asarray(to_rgb(grey))[:4].min() == 255
    palette = Image.fromarray((GREY > 100).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 200])
    palette.info["transparency"] = 0
    assert np.asarray(to_rgb(palette))[0, 0].tolist() == [255, 255, 255]


def test_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert close_to(read_image(tmp_path / name), np.broadcast_to([255, 0, 0], (8, 8, 3)), 3)


def test_exif_orientation(tmp_path):
    image = Image.fromarray(COLOUR[:4])
    exif = image.getexif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    assert close_to(read_image(tmp_path / "a.png"), np.rot90(COLOUR[:4], -1), 0)


def test_very_wide_image(tmp_path):
    Image.new("RGB", (6000, 4), "red").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (6000, 4)


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_broken_images_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_which_files_are_images(tmp_path):
    assert is_image_file("a.JPG") and is_image_file(Path("b.webp"))
    assert not is_image_file("a.mp4")
    (tmp_path / "frames.png").mkdir()
    assert not is_image_file(tmp_path / "frames.png")


def test_a_cover_picture_is_not_the_film(tmp_path):
    """The cover of a tagged file is a video stream too, and may come first."""
    film = write_video(tmp_path / "film.mp4", count=5)
    with av.open(str(film)) as source, av.open(str(tmp_path / "a.mkv"), "w") as target:
        cover = target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        copy = target.add_stream_from_template(source.streams.video[0])
        blank = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        target.mux(cover.encode(blank))
        target.mux(cover.encode())
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    assert which(read_video(tmp_path / "a.mkv", ALL), 5) == list(range(5))
