"""Procedural scenes of the embedded benchmark: seeded descriptions and their rendered frames.

A scene is a handful of coloured objects, each with a small dot of another colour on it, on a muted, textured, static
background. Four kinds:

- ``attributes`` (8 frames): two to five objects standing at named places, one of them larger than the others.
- ``needle`` (32 frames): ordinary objects, and two that are present for 1 to 4 frames only, each inside another quarter
  of the clip; one has a white border, one a black one.
- ``move`` (8 frames): one or two objects shift, the others stand still.
- ``order`` (8 frames): four objects appear one after the other and stay.

Each scene has a difficulty from 1 to 7 (``LEVELS``): what is asked about gets smaller, paler, shorter, nearer to the
noise. Everything follows from ``(split, kind, index)``, so the splits are disjoint streams of random numbers; the
difficulty goes round with the index.
"""

from dataclasses import dataclass, field, replace

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
BORDERS = {"white": 245, "black": 8}
PLACES = {
    "left": (17, 48),
    "right": (79, 48),
    "top": (48, 17),
    "bottom": (48, 79),
    "center": (48, 48),
}  # x, y in pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUARTERS = ("first", "second", "third", "last")
BORDER = 4.0  # pixels
DOT = 0.36  # the size of a dot, of its object's


@dataclass(frozen=True)
class Level:
    """What a difficulty means for the renderer.

    Attributes:
        size: side or diameter of an ordinary object, in pixels; a token covers 16.
        ratio: how many times larger the largest object of an attributes scene is.
        contrast: the share of its colour that an object shows, the rest is background.
        noise: standard deviation of each frame's own noise, of 255.
        shown: frames for which a bordered object is present.
        others: ordinary objects beside the two.
        shift: pixels that a moving object covers in a clip.
        gap: frames between two objects' appearances, at least.
    """

    size: float
    ratio: float
    contrast: float
    noise: float
    shown: int
    others: int
    shift: float
    gap: int


LEVELS = {
    1: Level(18.0, 1.60, 1.00, 3.0, 4, 1, 58.0, 2),
    2: Level(16.5, 1.50, 0.85, 3.5, 3, 1, 44.0, 2),
    3: Level(15.0, 1.42, 0.70, 4.0, 3, 2, 32.0, 1),
    4: Level(13.5, 1.36, 0.57, 4.5, 2, 2, 22.0, 1),
    5: Level(12.0, 1.30, 0.45, 5.0, 1, 3, 14.0, 1),
    6: Level(11.0, 1.25, 0.33, 7.0, 1, 3, 10.0, 1),
    7: Level(10.5, 1.22, 0.29, 8.0, 1, 3, 8.5, 1),
}
TRAINED = (1, 2, 3, 4, 5)  # the difficulties of the clips that the embedded model is trained on
# Those of the clips that it is asked about, kind by kind: chosen by what the dense model answers on the tune split, so
# that it is at the edge, not at the ceiling.
ASKED = {"attributes": (2, 3, 4, 5, 6), "needle": (4, 5, 6, 7), "move": (2, 3, 4, 5, 6), "order": (1, 2, 3, 4, 5)}


@dataclass
class Object:
    """One thing in a scene.

    Attributes:
        path: float32 [F, 2], the centre (x, y) in pixels at every frame.
        visible: bool [F].
        dot: the colour of the dot on it, from COLORS.
        size: side or diameter in pixels, with the border.
        place, motion: a name from PLACES or DIRECTIONS where that is what the scene says of the object, else None.
        border: a name from BORDERS, or None.
        largest: it is larger than every other object of an attributes scene.
    """

    color: str
    dot: str
    shape: str
    size: float
    path: np.ndarray
    visible: np.ndarray
    place: str | None = None
    motion: str | None = None
    border: str | None = None
    largest: bool = False

    @property
    def appears(self) -> int:
        """The first frame that shows the object."""
        return int(self.visible.argmax())


@dataclass
class Scene:
    """What a clip shows. ``seed`` renders it; ``kind`` is a key of FRAMES, ``difficulty`` of LEVELS."""

    kind: str
    seed: tuple[int, int, int, int]
    difficulty: int
    objects: list[Object] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return FRAMES[self.kind]


def sample_scene(split: str, kind: str, index: int, difficulty: int | None = None) -> Scene:
    """The scene number ``index`` of one split and kind; the same arguments give the same scene, on any machine.

    ``difficulty``, a key of LEVELS, goes round with the index where it is not given.
    """
    if split not in SPLITS or kind not in FRAMES:
        raise ValueError(
            f"tinyvideo: no scenes for split {split!r}, kind {kind!r}; splits {SPLITS}, kinds {tuple(FRAMES)}"
        )
    if difficulty is None:
        levels = TRAINED if split == "train" else ASKED[kind]
        difficulty = levels[index % len(levels)]
    seed = (SPLITS.index(split), tuple(FRAMES).index(kind), index, difficulty)
    rng = np.random.default_rng((0, *seed))
    sample = {"attributes": _attributes, "needle": _needle, "move": _move, "order": _order}[kind]
    return Scene(kind, seed, difficulty, sample(rng, LEVELS[difficulty]))


def _colors(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """n pairs of colours, an object's and its dot's: no colour is twice among either, none is in both of a pair."""
    while True:
        pairs = list(zip(*(rng.permutation(list(COLORS))[:n].tolist() for _ in range(2)), strict=True))
        if all(color != dot for color, dot in pairs):
            return pairs


def _object(
    rng: np.random.Generator, level: Level, colors: tuple[str, str], path: np.ndarray,
    visible: np.ndarray | None = None, **kw
) -> Object:  # fmt: skip
    visible = np.ones(len(path), bool) if visible is None else visible
    shape, size = ("disc", "square")[rng.integers(2)], level.size * float(rng.uniform(0.96, 1.04))
    return Object(*colors, shape, size, path.astype(np.float32), visible, **kw)


def _standing(
    rng: np.random.Generator, level: Level, colors: tuple[str, str], place: str, frames: int, visible=None, **kw
) -> Object:
    """An object at a named place: a little beside the exact spot, and drifting by a few pixels."""
    start = np.array(PLACES[place]) + rng.uniform(-3, 3, 2)
    path = start + np.linspace(0, 1, frames)[:, None] * rng.uniform(-2, 2, 2)
    return _object(rng, level, colors, path, visible, place=place, **kw)


def _places(rng: np.random.Generator, n: int) -> list[str]:
    return rng.permutation(list(PLACES))[:n].tolist()


def _attributes(rng: np.random.Generator, level: Level) -> list[Object]:
    n = int(rng.integers(2, 6))
    pairs = zip(_colors(rng, n), _places(rng, n), strict=True)
    objects = [_standing(rng, level, c, p, FRAMES["attributes"]) for c, p in pairs]
    objects[0].size, objects[0].largest = level.ratio * level.size, True
    return objects


def _needle(rng: np.random.Generator, level: Level) -> list[Object]:
    frames, n = FRAMES["needle"], 2 + level.others
    colors, places, needles = _colors(rng, n), _places(rng, n), []
    for border, quarter in zip(BORDERS, rng.permutation(4)[:2].tolist(), strict=True):
        first = 8 * quarter + int(rng.integers(1, 8 - level.shown))  # a frame away from its quarter's ends
        shown = (np.arange(frames) >= first) & (np.arange(frames) < first + level.shown)
        needle = _standing(rng, level, colors.pop(), places.pop(), frames, shown, border=border)
        needle.size += 2 * BORDER
        needles.append(needle)
    return [_standing(rng, level, c, p, frames) for c, p in zip(colors, places, strict=True)] + needles


def _move(rng: np.random.Generator, level: Level) -> list[Object]:
    frames, gap, margin = FRAMES["move"], 24.0, 13.0
    movers = 1 if rng.random() < 0.6 else 2
    horizontal = bool(rng.integers(2))
    names = ("left", "right") if horizontal else ("up", "down")
    colors = _colors(rng, 3)
    while True:  # lanes far enough apart, the movers' first
        lanes = rng.uniform(15, 81, 3 if movers == 1 else 2)
        if np.diff(np.sort(lanes)).min() >= gap:
            break
    objects = []
    for number, lane in enumerate(lanes):
        if number < movers:
            name = names[rng.integers(2)]
            start = rng.uniform(margin, SIZE - margin - level.shift)
            along = np.linspace(start, start + level.shift, frames)
            along = along if name in ("right", "down") else SIZE - along
        else:
            name, along = None, np.full(frames, rng.uniform(15, 81))
        across = np.full(frames, lane)
        path = np.stack((along, across) if horizontal else (across, along), 1)
        objects.append(_object(rng, level, colors[number], path, motion=name))
    return objects


def _order(rng: np.random.Generator, level: Level) -> list[Object]:
    """Four objects; the first stands there from the start, the last for a frame or more."""
    frames = FRAMES["order"]
    while True:
        starts = np.sort(rng.choice(np.arange(1, frames), 3, replace=False))
        if np.diff(starts, prepend=0).min() >= level.gap:
            break
    return [
        _standing(rng, level, c, p, frames, np.arange(frames) >= start)
        for c, p, start in zip(_colors(rng, 4), _places(rng, 4), (0, *starts.tolist()), strict=True)
    ]


def coverage(obj: Object) -> np.ndarray:
    """How much of each pixel the object covers, float32 [F, 96, 96] in 0..1, zero where it is not visible."""
    return _cover(obj, obj.shape, obj.size / 2)


def _cover(obj: Object, shape: str, half: float) -> np.ndarray:
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    dx = axis[None, None, :] - obj.path[:, 0, None, None]
    dy = axis[None, :, None] - obj.path[:, 1, None, None]
    disc = shape == "disc"
    inside = 1.1 * half - np.sqrt(dx * dx + dy * dy) if disc else half - np.maximum(np.abs(dx), np.abs(dy))
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
    level = LEVELS[scene.difficulty]
    frames = np.repeat(_background(rng)[None], scene.frames, 0)
    for obj in scene.objects:
        shown = np.flatnonzero(obj.visible)
        seen = replace(obj, path=obj.path[shown], visible=obj.visible[shown])
        half = obj.size / 2 - BORDER * (obj.border is not None)
        color, dot = (np.array(COLORS[c], np.float32) + rng.uniform(-12, 12, 3) for c in (obj.color, obj.dot))
        color = color + _cover(seen, "disc", DOT * half)[..., None] * (dot - color)
        if obj.border:
            color = BORDERS[obj.border] + _cover(seen, obj.shape, half)[..., None] * (color - BORDERS[obj.border])
        frames[shown] += (level.contrast * coverage(seen)[..., None] * (color - frames[shown])).astype(np.float32)
    frames += level.noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def token_objects(scene: Scene, cell: int = CELL) -> np.ndarray:
    """Which object each visual token shows, int64 [F, 96 / cell, 96 / cell]: an index into ``scene.objects``, or −1.

    A token shows an object that covers more than an eighth of its ``cell`` × ``cell`` pixels; −1 is background.
    """
    cells = SIZE // cell
    share = np.stack([coverage(o).reshape(scene.frames, cells, cell, cells, cell).mean((2, 4)) for o in scene.objects])
    return np.where(share.max(0) > 0.125, share.argmax(0), -1)
