"""Procedural scenes of the embedded benchmark: seeded descriptions and their rendered frames.

A scene is a handful of saturated objects on a muted, textured, static background. Four kinds:

- ``attributes`` (8 frames): one to four objects standing at named places.
- ``needle`` (32 frames): two ordinary objects, and one with a white border that is present for 3 or 4 frames only,
  all of them inside one quarter of the clip.
- ``move`` (8 frames): one or two objects cross the picture, the others stand still.
- ``order`` (8 frames): three objects appear one after the other and stay.

Everything follows from ``(split, kind, index)``, so the splits are disjoint streams of random numbers.
"""

from dataclasses import dataclass, field

import numpy as np

SIZE = 96  # pixels, height and width of a frame
CELL = 16  # pixels, side of the patch of picture that one visual token of the tiny VLM covers
FPS = 4  # frames a second of the rendered videos
FRAMES = {"attributes": 8, "needle": 32, "move": 8, "order": 8}
SPLITS = ("train", "tune", "test")

COLORS = {
    "red": (220, 35, 35),
    "green": (35, 175, 55),
    "blue": (45, 75, 230),
    "yellow": (235, 215, 45),
    "cyan": (45, 210, 220),
    "magenta": (215, 55, 210),
}
PLACES = {
    "left": (17, 48),
    "right": (79, 48),
    "top": (48, 17),
    "bottom": (48, 79),
    "center": (48, 48),
}  # x, y in pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUARTERS = ("first", "second", "third", "last")


@dataclass
class Object:
    """One thing in a scene.

    Attributes:
        path: float32 [F, 2], the centre (x, y) in pixels at every frame.
        visible: bool [F].
        size: side or diameter in pixels.
        place, motion: a name from PLACES or DIRECTIONS where that is what the scene says of the object, else None.
        framed: it wears a white border (the needle).
    """

    color: str
    shape: str
    size: float
    path: np.ndarray
    visible: np.ndarray
    place: str | None = None
    motion: str | None = None
    framed: bool = False

    @property
    def appears(self) -> int:
        """The first frame that shows the object."""
        return int(self.visible.argmax())


@dataclass
class Scene:
    """What a clip shows. ``seed`` renders it; ``kind`` is a key of FRAMES."""

    kind: str
    seed: tuple[int, int, int]
    objects: list[Object] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return FRAMES[self.kind]


def sample_scene(split: str, kind: str, index: int) -> Scene:
    """The scene number ``index`` of one split and kind; the same arguments give the same scene, on any machine."""
    if split not in SPLITS or kind not in FRAMES:
        raise ValueError(
            f"tinyvideo: no scenes for split {split!r}, kind {kind!r}; splits {SPLITS}, kinds {tuple(FRAMES)}"
        )
    seed = (SPLITS.index(split), tuple(FRAMES).index(kind), index)
    rng = np.random.default_rng((0, *seed))
    return Scene(kind, seed, {"attributes": _attributes, "needle": _needle, "move": _move, "order": _order}[kind](rng))


def _object(rng: np.random.Generator, color: str, path: np.ndarray, visible: np.ndarray | None = None, **kw) -> Object:
    visible = np.ones(len(path), bool) if visible is None else visible
    shape = ("disc", "square")[rng.integers(2)]
    return Object(color, shape, float(rng.uniform(17, 21)), path.astype(np.float32), visible, **kw)


def _standing(rng: np.random.Generator, color: str, place: str, frames: int, visible=None, **kw) -> Object:
    """An object at a named place: a little beside the exact spot, and drifting by a few pixels."""
    start = np.array(PLACES[place]) + rng.uniform(-3, 3, 2)
    path = start + np.linspace(0, 1, frames)[:, None] * rng.uniform(-2, 2, 2)
    return _object(rng, color, path, visible, place=place, **kw)


def _colors_places(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    return list(
        zip(rng.permutation(list(COLORS))[:n].tolist(), rng.permutation(list(PLACES))[:n].tolist(), strict=True)
    )


def _attributes(rng: np.random.Generator) -> list[Object]:
    pairs = _colors_places(rng, int(rng.integers(1, 5)))
    return [_standing(rng, c, p, FRAMES["attributes"]) for c, p in pairs]


def _needle(rng: np.random.Generator) -> list[Object]:
    frames = FRAMES["needle"]
    (needle_color, needle_place), *others = _colors_places(rng, 3)
    length = int(rng.integers(3, 5))
    first = 8 * int(rng.integers(4)) + int(rng.integers(1, 8 - length))  # a frame away from both ends of its quarter
    shown = (np.arange(frames) >= first) & (np.arange(frames) < first + length)
    needle = _standing(rng, needle_color, needle_place, frames, shown, framed=True)
    needle.size += 5.0  # the border takes some of the coloured area
    return [_standing(rng, c, p, frames) for c, p in others] + [needle]


def _move(rng: np.random.Generator) -> list[Object]:
    frames, gap = FRAMES["move"], 26.0
    movers = 1 if rng.random() < 0.6 else 2
    horizontal = bool(rng.integers(2))
    names = ("left", "right") if horizontal else ("up", "down")
    colors = rng.permutation(list(COLORS)).tolist()
    while True:  # lanes far enough apart, the movers' first
        lanes = rng.uniform(15, 81, 3 if movers == 1 else 2)
        if np.diff(np.sort(lanes)).min() >= gap:
            break
    objects = []
    for number, lane in enumerate(lanes):
        if number < movers:
            name = names[rng.integers(2)]
            along = np.linspace(rng.uniform(13, 21), rng.uniform(75, 83), frames)
            along = along if name in ("right", "down") else SIZE - along
        else:
            name, along = None, np.full(frames, rng.uniform(15, 81))
        across = np.full(frames, lane)
        path = np.stack((along, across) if horizontal else (across, along), 1)
        objects.append(_object(rng, colors[number], path, motion=name))
    return objects


def _order(rng: np.random.Generator) -> list[Object]:
    frames = FRAMES["order"]
    second = int(rng.integers(2, 4))
    starts = (0, second, int(rng.integers(second + 2, 7)))
    return [
        _standing(rng, c, p, frames, np.arange(frames) >= start)
        for (c, p), start in zip(_colors_places(rng, 3), starts, strict=True)
    ]


def coverage(obj: Object) -> np.ndarray:
    """How much of each pixel the object covers, float32 [F, 96, 96] in 0..1, zero where it is not visible."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    dx = axis[None, None, :] - obj.path[:, 0, None, None]
    dy = axis[None, :, None] - obj.path[:, 1, None, None]
    half = obj.size / 2
    if obj.shape == "disc":
        inside = 1.1 * half - np.sqrt(dx * dx + dy * dy)
    else:
        inside = half - np.maximum(np.abs(dx), np.abs(dy))
    return np.clip(inside + 0.5, 0, 1) * obj.visible[:, None, None]


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted low-frequency texture, float32 [96, 96, 3]: a coarse random grid, interpolated."""
    coarse = rng.normal(0, 14, (7, 7, 1)) + rng.normal(0, 5, (7, 7, 3)) + rng.uniform(70, 140) + rng.normal(0, 6, 3)
    at = np.linspace(0, 6, SIZE)
    low = np.minimum(at.astype(int), 5)
    weight = np.zeros((SIZE, 7))
    weight[np.arange(SIZE), low] = 1 - (at - low)
    weight[np.arange(SIZE), low + 1] = at - low
    return np.einsum("yi,xj,ijc->yxc", weight, weight, coarse, optimize=True).astype(np.float32)


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene, uint8 [F, 96, 96, 3] RGB, with a little sensor noise of their own each."""
    rng = np.random.default_rng((1, *scene.seed))
    frames = np.repeat(_background(rng)[None], scene.frames, 0)
    for obj in scene.objects:
        shown = np.flatnonzero(obj.visible)
        alpha = coverage(obj)[shown, ..., None]
        color = np.array(COLORS[obj.color], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
        if obj.framed:
            inner = Object(obj.color, obj.shape, obj.size - 9, obj.path, obj.visible)
            filling = coverage(inner)[shown, ..., None]
            color = 245 * (1 - filling) + color * filling
        frames[shown] += alpha * (color - frames[shown])
    frames += 3 * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def token_objects(scene: Scene, cell: int = CELL) -> np.ndarray:
    """Which object each visual token shows, int64 [F, 96 / cell, 96 / cell]: an index into ``scene.objects``, or −1.

    A token shows an object that covers more than a quarter of its ``cell`` × ``cell`` pixels; −1 is background.
    """
    cells = SIZE // cell
    share = np.stack([coverage(o).reshape(scene.frames, cells, cell, cells, cell).mean((2, 4)) for o in scene.objects])
    return np.where(share.max(0) > 0.25, share.argmax(0), -1)
