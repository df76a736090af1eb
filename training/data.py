"""Training batches: clips rendered on the fly, many questions a clip, and dense labels for the auxiliary losses."""

import itertools
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.utils.data import IterableDataset

from focuslib.tasks.tinyimage.build import FRAME
from focuslib.tasks.tinyvideo.questions import CHOICES, LETTERS, Question, prompt, questions
from focuslib.tasks.tinyvideo.scenes import (
    BORDERS,
    CELL,
    COLORS,
    DIRECTIONS,
    FRAMES,
    SIZE,
    TRAINED,
    Scene,
    render,
    sample_scene,
    token_objects,
)
from training.tokenizer import FOOTER, HEADER

SLOT = 52  # tokens: the longest question with its options, instruction and answer
TOLD = 10  # tokens more, where the answer is told before the question
TYPES = tuple(CHOICES)
WORDS = tuple(sorted({word for choice in CHOICES.values() for word in choice}))
OBJECT_CLASSES = 1 + (1 + len(BORDERS)) * len(COLORS)  # background, then each colour without border, with each border
LOOKS = {"object_class": OBJECT_CLASSES, "dot": len(COLORS), "largest": 2}
TOLD_LATER = {"cell": (SIZE // CELL) ** 2, "motion": 5, "appears": 8, "rank": 4, "time": 8}
LABELS = {**LOOKS, **TOLD_LATER}  # what is told of a visual token, with its number of classes: see token_labels
IGNORE = -100
CELLS = np.arange((SIZE // CELL) ** 2).reshape(SIZE // CELL, -1)  # the place of a frame's 6 × 6 tokens
CELLS_8 = CELLS.repeat(2, 0).repeat(2, 1)  # the cell of a picture's 12 × 12 tokens


@dataclass
class Batch:
    """B clips of F frames, or B pictures (F = 1), with N questions each; all but ``header`` have a leading axis B.

    There are S visual tokens before the closing newline: F·36 of a clip, 12·12 + 12·13 − 1 of a picture.

    - header [H]: token ids before the clip; frames uint8 [B, F, 96, 96, 3].
    - keep int64 [B, K]: the visual tokens the decoder sees, positions 0 to S − 1, ascending.
    - labels: one int64 [B, K] for each name of LABELS, of those tokens; looks: one [B, S] for each of LOOKS, of all.
    - ids int64 [B, N, SLOT]; ask, answer [B, N]: where the question mark and the last prompt token stand.
    - letter, word, kind int64 [B, N]: token id of the right letter, index into WORDS, index into TYPES.
    - option_at int64 [B, N, 4]: where the options' words stand; right int64 [B, N]: which is right, 0 to 3.
    - evidence bool [B, N, K]: the visual tokens that show what a question is about.
    """

    header: torch.Tensor
    frames: torch.Tensor
    keep: torch.Tensor
    labels: dict[str, torch.Tensor]
    looks: dict[str, torch.Tensor]
    ids: torch.Tensor
    ask: torch.Tensor
    answer: torch.Tensor
    letter: torch.Tensor
    word: torch.Tensor
    kind: torch.Tensor
    option_at: torch.Tensor
    right: torch.Tensor
    evidence: torch.Tensor

    def to(self, device) -> "Batch":
        def move(value):
            return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)

        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))


def token_labels(scene: Scene, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What each visual token shows, int64 [S] for each name of LABELS; IGNORE where there is nothing to tell.

    Its object's class, dot, whether it is the largest, motion, first frame, how many of its kind appeared before it;
    the token's own place and time. ``shown`` is ``token_objects(scene)`` or ``picture_objects(scene)``.
    Motion is told only from the fourth frame on and first frames only of scenes with appearances: a causal decoder
    cannot know more. A picture has no time.
    """
    frame = np.arange(len(shown))[:, None, None]
    colors, directions, objects = list(COLORS), list(DIRECTIONS), scene.objects
    nothing = np.full(shown.size, IGNORE)

    def pick(values, empty):
        return np.where(shown >= 0, np.array(values)[shown], empty).ravel()

    moving, ordered = scene.kind == "move", scene.kind == "order"
    appears = [o.appears for o in objects]
    classes = [1 + colors.index(o.color) + len(colors) * (None, *BORDERS).index(o.border) for o in objects]
    motion = pick([1 + directions.index(o.motion) if o.motion else 0 for o in objects], IGNORE)
    if scene.kind == "needle":
        events = [o.appears for o in objects if o.border]
        rank = pick([sorted(events).index(o.appears) if o.border else IGNORE for o in objects], IGNORE)
    else:
        rank = pick(np.argsort(np.argsort(appears)), IGNORE) if ordered else nothing
    return {
        "object_class": pick(classes, 0),
        "dot": pick([colors.index(o.dot) for o in objects], IGNORE),
        "largest": pick([int(o.largest) for o in objects], 0) if scene.kind == "attributes" else nothing,
        "cell": (np.broadcast_to(CELLS, shown.shape) if len(shown) > 1 else as_picture(CELLS_8, IGNORE)).ravel(),
        "motion": np.where(np.broadcast_to(frame >= 3, shown.shape).ravel(), motion, IGNORE) if moving else nothing,
        "appears": pick(appears, IGNORE) if ordered else nothing,
        "rank": rank,
        "time": np.broadcast_to(frame // 4 if len(shown) > 1 else IGNORE, shown.shape).ravel(),
    }


def picture_objects(scene: Scene) -> np.ndarray:
    """Which object each visual token of a scene's picture shows, int64 [1, 1, S], like ``token_objects``."""
    return as_picture(token_objects(scene, cell=8)[FRAME], -1)


def as_picture(patches: np.ndarray, newline: int) -> np.ndarray:
    """A value of each of a picture's 12 × 12 patches → of each visual token of it, [1, 1, S].

    The model reads a picture of 96 × 96 pixels twice: 12 × 12 tokens, then as one tile with a newline after each row,
    the last of which closes it.
    """
    rows = np.pad(patches, ((0, 0), (0, 1)), constant_values=newline)
    return np.concatenate((patches.ravel(), rows.ravel()[:-1]))[None, None]


def keep_tokens(object_class: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Token dropout: a random ``share`` of a clip's visual tokens, ascending, objects preferred, bordered ones most."""
    score = rng.random(object_class.size) + 0.5 * (object_class > 0) + 0.5 * (object_class > len(COLORS))
    return np.sort(np.argsort(-score)[: round(share * object_class.size)])


class Slots:
    """Turns questions into padded token rows, with the places of what the losses look at."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
        self.mark, self.newline = tokenizer.convert_tokens_to_ids("?"), tokenizer("\n")["input_ids"][0]

    def row(self, question: Question, rng: np.random.Generator, told: bool = False) -> dict:
        """One row of Batch's ids, ask, answer, …; ``told`` gives the answer away before the question."""
        options, letter = question.options(rng)
        hint = f"\nthe answer is {question.answer}." if told else ""
        ids = self.tokenizer(hint + "\n" + prompt(question.text, options) + FOOTER)["input_ids"]
        answer, ask, right = len(ids) - 1, ids.index(self.mark), LETTERS.index(letter)
        ids += [self.letters[right], self.tokenizer.eos_token_id]
        lines = [i for i in range(ask, answer) if ids[i] == self.newline]
        return {
            "ids": ids + [self.tokenizer.pad_token_id] * (SLOT + TOLD * told - len(ids)),
            "ask": ask,
            "answer": answer,
            "letter": self.letters[right],
            "word": WORDS.index(question.answer),
            "kind": TYPES.index(question.type),
            "option_at": [i - 1 for i in lines[1:5]],
            "right": right,
            "hint": len(self.tokenizer(hint)["input_ids"]) if told else 0,
        }


class Texts(IterableDataset):
    """An endless, seeded stream of questions without a clip, whose answer is told: a dict of Batch's rows with B = 1.

    ``hint`` int64 [1, N] counts the tokens that tell the answer.
    """

    def __init__(self, tokenizer, asked: int, start: int = 0):
        self.slots, self.asked, self.start = Slots(tokenizer), asked, start

    def __iter__(self):
        scenes = [sample_scene("train", kind, index) for kind in FRAMES for index in range(200)]
        pool = {kind: [q for scene in scenes for q in questions(scene) if q.type == kind] for kind in TYPES}
        for number in itertools.count(self.start):
            rng = np.random.default_rng((4, number))
            asked = [pool[kind][rng.integers(len(pool[kind]))] for kind in rng.choice(TYPES, self.asked)]
            rows = [self.slots.row(question, rng, told=True) for question in asked]
            yield {name: torch.tensor([[row[name] for row in rows]]) for name in rows[0]}


class Batches(IterableDataset):
    """An endless, seeded stream: batch number ``start``, ``start + 1``, … of one mix of clips.

    Args:
        kinds: scene kinds and their weights; all of one frame count.
        shares: the shares of visual tokens to keep, one drawn a batch; levels: the difficulties, one drawn a clip.
        picture: one frame of each clip, as a picture.
    """

    def __init__(
        self, tokenizer, kinds: dict[str, float], clips: int, asked: int, shares=(1.0,), levels=TRAINED,
        split="train", start=0, seed=0, picture=False,
    ):  # fmt: skip
        if len({FRAMES[kind] for kind in kinds}) != 1:
            raise ValueError(f"tiny.data: clips of different lengths cannot share a batch: {sorted(kinds)}")
        self.slots, self.kinds, self.clips, self.asked, self.shares = Slots(tokenizer), kinds, clips, asked, shares
        self.levels, self.split, self.start, self.seed, self.picture = levels, split, start, seed, picture
        self.header = torch.tensor(tokenizer(HEADER)["input_ids"])

    def __iter__(self):
        return map(self.batch, itertools.count(self.start))

    def batch(self, number: int) -> Batch:
        rng = np.random.default_rng((2, self.seed, number, *FRAMES.values(), self.clips))
        names, weights = zip(*self.kinds.items(), strict=True)
        share = rng.choice(self.shares)
        rows = []
        for clip in range(self.clips):
            kind = str(rng.choice(names, p=np.array(weights) / sum(weights)))
            index = (self.seed * 1_000_000 + number) * self.clips + clip
            scene = sample_scene(self.split, kind, index, int(rng.choice(self.levels)))
            shown = picture_objects(scene) if self.picture else token_objects(scene)
            labels = token_labels(scene, shown)
            keep = keep_tokens(labels["object_class"], share, rng)
            rows.append(
                {
                    "frames": render(scene)[[FRAME]] if self.picture else render(scene),
                    "keep": keep,
                    "labels": {name: values[keep] for name, values in labels.items()},
                    "looks": {name: labels[name] for name in LOOKS},
                    **self._questions(scene, shown.ravel()[keep], rng),
                }
            )
        return Batch(self.header, **_stack(rows))

    def _questions(self, scene: Scene, shown: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pool = questions(scene)
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-self.asked // len(pool)))]).tolist()
        each = list(
            {pool[i].type: n for n, i in reversed(list(enumerate(order)))}.values()
        )  # one of each type comes first
        order = ([order[n] for n in each] + [i for n, i in enumerate(order) if n not in each])[: self.asked]
        rows = [self.slots.row(pool[i], rng) for i in order]
        for row, about in zip(rows, (pool[i].about for i in order), strict=True):
            row["evidence"] = np.isin(shown, about)
        return {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "hint"}


def _stack(rows: list[dict]) -> dict:
    """Rows of arrays, or of dicts of arrays → tensors with a leading axis."""
    return {
        name: _stack([row[name] for row in rows])
        if isinstance(rows[0][name], dict)
        else torch.from_numpy(np.stack([row[name] for row in rows]))
        for name in rows[0]
    }
