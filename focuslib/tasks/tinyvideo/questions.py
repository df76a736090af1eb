"""Multiple-choice questions about a scene, in the shape of the usual video benchmarks."""

from dataclasses import dataclass

import numpy as np

from focuslib.tasks.tinyvideo.scenes import COLORS, DIRECTIONS, PLACES, QUARTERS, Scene

LETTERS = "ABCD"
COUNTS = ("one", "two", "three", "four")
INSTRUCTION = "Answer with the option's letter from the given choices directly."

# The answer words of each question type; every question offers four of them.
CHOICES = {
    "color_at": tuple(COLORS),
    "place_of": tuple(PLACES),
    "count": COUNTS,
    "needle_color": tuple(COLORS),
    "needle_place": tuple(PLACES),
    "needle_when": QUARTERS,
    "direction": tuple(DIRECTIONS),
    "mover": tuple(COLORS),
    "first": tuple(COLORS),
    "last": tuple(COLORS),
}

# Which question types make up which task, by the kind of clip they are asked about.
TASKS = {
    "attributes": {"attributes": ("color_at", "place_of", "count")},
    "needle": {"needle": ("needle_color", "needle_place", "needle_when")},
    "motion": {"move": ("direction", "mover"), "order": ("first", "last")},
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
    colors = tuple(o.color for o in scene.objects)
    asked = []
    for i, o in enumerate(scene.objects):
        if o.framed:
            name = "object with the white border"
            quarter = QUARTERS[4 * o.appears // scene.frames]
            asked.append(Question("needle_color", f"What color is the {name}?", o.color, (i,), colors))
            asked.append(Question("needle_place", f"Where does the {name} appear?", str(o.place), (i,)))
            asked.append(
                Question("needle_when", f"In which quarter of the video does the {name} appear?", quarter, (i,))
            )
        elif o.place:
            asked.append(Question("color_at", f"What color is the object at the {o.place}?", o.color, (i,), colors))
            asked.append(Question("place_of", f"Where is the {o.color} object?", o.place, (i,)))
        elif o.motion:
            asked.append(Question("direction", f"In which direction does the {o.color} object move?", o.motion, (i,)))
    everything = tuple(range(len(scene.objects)))
    if scene.kind == "attributes":
        asked.append(Question("count", "How many objects are there?", COUNTS[len(scene.objects) - 1], everything))
    movers = [i for i in everything if scene.objects[i].motion]
    if len(movers) == 1:
        asked.append(Question("mover", "What color is the moving object?", colors[movers[0]], tuple(movers), colors))
    if scene.kind == "order":
        first, *_, last = sorted(everything, key=lambda i: scene.objects[i].appears)
        asked.append(Question("first", "What color is the object that appears first?", colors[first], (first,), colors))
        asked.append(Question("last", "What color is the object that appears last?", colors[last], (last,), colors))
    return asked
