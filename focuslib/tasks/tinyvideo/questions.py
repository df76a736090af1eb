"""Multiple-choice questions about a scene, in the shape of the usual video benchmarks."""

from dataclasses import dataclass

import numpy as np

from focuslib.tasks.tinyvideo.scenes import COLORS, DIRECTIONS, PLACES, QUARTERS, Scene

LETTERS = "ABCD"
COUNTS = ("two", "three", "four", "five")
INSTRUCTION = "Answer with the option's letter from the given choices directly."

# The answer words of each question type; every question offers four of them.
CHOICES = {
    "color_at": tuple(COLORS),
    "place_of": tuple(PLACES),
    "dot_on": tuple(COLORS),
    "with_dot": tuple(COLORS),
    "largest": tuple(COLORS),
    "count": COUNTS,
    "needle_color": tuple(COLORS),
    "needle_place": tuple(PLACES),
    "needle_dot": tuple(COLORS),
    "needle_when": QUARTERS,
    "needle_first": tuple(COLORS),
    "direction": tuple(DIRECTIONS),
    "mover": tuple(COLORS),
    "first": tuple(COLORS),
    "second": tuple(COLORS),
    "third": tuple(COLORS),
    "last": tuple(COLORS),
}

# Which question types make up which task, by the kind of clip they are asked about.
TASKS = {
    "attributes": {"attributes": ("color_at", "place_of", "dot_on", "with_dot", "largest", "count")},
    "needle": {"needle": ("needle_color", "needle_place", "needle_dot", "needle_when", "needle_first")},
    "motion": {"move": ("direction", "mover"), "order": ("first", "second", "third", "last")},
}


@dataclass
class Question:
    """A question and its right answer.

    Attributes:
        about: indices into the scene's objects, of those that show the answer.
        tempting: the words that make good wrong options, because the clip shows them.
    """

    type: str
    text: str
    answer: str
    about: tuple[int, ...]
    tempting: tuple[str, ...] = ()

    def options(self, rng: np.random.Generator, position: int | None = None) -> tuple[list[str], str]:
        """Four shuffled options and the right letter; ``position`` (0 to 3) puts the answer there."""
        rest = [w for w in CHOICES[self.type] if w != self.answer]
        first = [w for w in rest if w in self.tempting]
        others = [w for w in rest if w not in self.tempting]
        wrong = (rng.permutation(first).tolist() + rng.permutation(others).tolist())[:3]
        wrong = rng.permutation(wrong).tolist()
        position = int(rng.integers(4)) if position is None else position
        return [*wrong[:position], self.answer, *wrong[position:]], LETTERS[position]


def prompt(question: str, options: list[str]) -> str:
    """The text a model reads after the video."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([question, *lines, INSTRUCTION])


def questions(scene: Scene) -> list[Question]:
    """Every question with one clear answer that can be asked about a scene, in a fixed order."""
    return {"attributes": _attributes, "needle": _needle, "move": _move, "order": _order}[scene.kind](scene)


def _colors(scene: Scene) -> tuple[str, ...]:
    return tuple(o.color for o in scene.objects)


def _attributes(scene: Scene) -> list[Question]:
    asked, colors, dots = [], _colors(scene), tuple(o.dot for o in scene.objects)
    for i, o in enumerate(scene.objects):
        asked.append(Question("color_at", f"What color is the object at the {o.place}?", o.color, (i,), colors))
        asked.append(Question("place_of", f"Where is the {o.color} object?", str(o.place), (i,)))
        asked.append(Question("dot_on", f"What color is the dot on the {o.color} object?", o.dot, (i,), dots))
        asked.append(Question("with_dot", f"What color is the object with the {o.dot} dot?", o.color, (i,), colors))
        if o.largest:
            asked.append(Question("largest", "What color is the largest object?", o.color, (i,), colors))
    everything = tuple(range(len(scene.objects)))
    asked.append(Question("count", "How many objects are there?", COUNTS[len(everything) - 2], everything))
    return asked


def _needle(scene: Scene) -> list[Question]:
    asked, colors, dots = [], _colors(scene), tuple(o.dot for o in scene.objects)
    bordered = [(i, o) for i, o in enumerate(scene.objects) if o.border]
    for i, o in bordered:
        name, quarter = f"object with the {o.border} border", QUARTERS[4 * o.appears // scene.frames]
        asked.append(Question("needle_color", f"What color is the {name}?", o.color, (i,), colors))
        asked.append(Question("needle_place", f"Where does the {name} appear?", str(o.place), (i,)))
        asked.append(Question("needle_dot", f"What color is the dot on the {name}?", o.dot, (i,), dots))
        asked.append(Question("needle_when", f"In which quarter of the video does the {name} appear?", quarter, (i,)))
    i, first = min(bordered, key=lambda each: each[1].appears)
    about = "What color is the object with a border that appears first?"
    asked.append(Question("needle_first", about, first.color, (i,), colors))
    return asked


def _move(scene: Scene) -> list[Question]:
    movers = [i for i, o in enumerate(scene.objects) if o.motion]
    asked = []
    for i in movers:
        o = scene.objects[i]
        asked.append(Question("direction", f"In which direction does the {o.color} object move?", str(o.motion), (i,)))
    if len(movers) == 1:
        colors = _colors(scene)
        asked.append(Question("mover", "What color is the moving object?", colors[movers[0]], tuple(movers), colors))
    return asked


def _order(scene: Scene) -> list[Question]:
    colors = _colors(scene)
    inorder = sorted(range(len(colors)), key=lambda i: scene.objects[i].appears)
    return [
        Question(name, f"What color is the object that appears {name}?", colors[i], (i,), colors)
        for name, i in zip(("first", "second", "third", "last"), inorder, strict=True)
    ]
