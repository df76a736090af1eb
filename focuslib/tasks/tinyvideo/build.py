"""Builds the benchmark's videos and questions once, into a cache folder: half a minute of work, a few megabytes.

The folder's name carries a digest of everything that decides its content, so a change of the scenes never meets old
videos.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from focuslib.errors import UserError
from focuslib.tasks.build_once import build_once
from focuslib.tasks.tinyvideo.questions import TASKS, questions
from focuslib.tasks.tinyvideo.scenes import FPS, SIZE, render, sample_scene

QUESTIONS = {"tune": 240, "test": 480}  # of a task
PER_CLIP = {"attributes": 3, "needle": 3, "move": 2, "order": 2}  # questions about a clip, of different types
CODECS = ("libx264", "mpeg4")  # the first that this PyAV can encode


def cache_root() -> Path:
    """Where videos are kept: ``$FOCUS_CACHE/tinyvideo``, by default ``~/.cache/focus/tinyvideo``."""
    return Path(os.environ.get("FOCUS_CACHE", "~/.cache/focus")).expanduser() / "tinyvideo"


def version() -> str:
    """A digest of the sources that decide what the videos and questions are."""
    here = Path(__file__).parent
    sources = b"".join((here / name).read_bytes() for name in ("scenes.py", "questions.py", "build.py"))
    return hashlib.sha256(sources).hexdigest()[:12]


def task_docs(task: str, split: str) -> list[dict]:
    """The questions of one task and split, dealt so that every first so many hold each question type in proportion.

    Each is a dict: id, video (path relative to the built folder), question, options (four words), answer (a letter),
    answer_text, question_type, difficulty (of the clip, see scenes). There are as many of each type, and about as many
    of each difficulty. The right letters go round A to D in shuffled fours, and of the questions that a clip allows
    those whose answer was rarest so far come first, so that neither letters nor words give an answer away.
    """
    rng = np.random.default_rng((3, list(QUESTIONS).index(split), list(TASKS).index(task)))
    each = QUESTIONS[split] // sum(map(len, TASKS[task].values()))
    docs, positions = [], []
    for kind, types in TASKS[task].items():
        missing = dict.fromkeys(types, each)
        answers: Counter[tuple[str, str]] = Counter()
        index = 0
        while any(missing.values()):
            scene = sample_scene(split, kind, index)
            pool = [q for q in questions(scene) if missing.get(q.type)]
            order = rng.permutation(len(pool)).tolist()
            # the type that misses most first, of each type the question whose answer is rarest so far
            order.sort(key=lambda i: (-missing[pool[i].type], answers[pool[i].type, pool[i].answer]))
            first = {pool[i].type: i for i in reversed(order)}
            for number, i in enumerate([i for i in order if first[pool[i].type] == i][: PER_CLIP[kind]]):
                question = pool[i]
                missing[question.type] -= 1
                answers[question.type, question.answer] += 1
                positions = positions or rng.permutation(4).tolist()
                options, letter = question.options(rng, positions.pop())
                docs.append(
                    {
                        "id": f"{task}-{split}-{kind}-{index:04d}-{number}",
                        "video": f"videos/{split}-{kind}-{index:04d}.mp4",
                        "question": question.text,
                        "options": options,
                        "answer": letter,
                        "answer_text": question.answer,
                        "question_type": question.type,
                        "difficulty": scene.difficulty,
                    }
                )
            index += 1
    return deal(docs, rng)


def deal(docs: list[dict], rng: np.random.Generator) -> list[dict]:
    """Shuffle questions so that a limit, which takes the first ones, is a stratified sample.

    Of a type that has n of N questions, the first k hold k·n / N, to within one; and within a type the difficulties
    come in proportion too.
    """
    shuffled = [docs[i] for i in rng.permutation(len(docs))]
    graded = _interleave(shuffled, lambda doc: (doc["question_type"], doc["difficulty"]))
    return _interleave(graded, lambda doc: doc["question_type"])


def _interleave(docs: list[dict], group: Callable[[dict], object]) -> list[dict]:
    """Spread each group evenly over the list, without changing the order within it."""
    counts, dealt = Counter(map(group, docs)), Counter()
    places = []
    for doc in docs:
        name = group(doc)
        places.append(((dealt[name] + 0.5) / counts[name], str(name)))
        dealt[name] += 1
    return [docs[i] for i in sorted(range(len(docs)), key=places.__getitem__)]


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode uint8 [F, 96, 96, 3] RGB frames as an mp4 at FPS frames a second, at visually lossless quality."""
    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UserError(f"tinyvideo: this PyAV can encode none of {CODECS}; install av from conda-forge or PyPI")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"qscale": "2"}
        if codec == "libx264":  # with its macroblock tree the same frames gave other files from run to run
            stream.options = {"crf": "18", "preset": "fast", "x264-params": "mbtree=0"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def build(root: Path | None = None) -> Path:
    """The folder with ``videos/`` and ``<task>_<split>.jsonl``, built now if it is not there yet."""
    return build_once((Path(root) if root else cache_root()) / version(), _fill)


def _fill(folder: Path) -> None:
    (folder / "videos").mkdir()
    videos = set()
    for task in TASKS:
        for split in QUESTIONS:
            docs = task_docs(task, split)
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
            videos.update(d["video"] for d in docs)

    def write(video: str) -> None:
        split, kind, index = Path(video).stem.split("-")
        write_video(folder / video, render(sample_scene(split, kind, int(index))))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = pool.map(write, sorted(videos))
        for _ in tqdm(written, desc="building the tinyvideo benchmark", unit="clip", total=len(videos)):
            pass


def load_docs(task: str, split: str, root: Path | None = None) -> list[dict]:
    """The docs of one task and split with absolute video paths, building the benchmark first if need be."""
    folder = build(root)
    lines = (folder / f"{task}_{split}.jsonl").read_text().splitlines()
    return [{**doc, "video": str(folder / doc["video"])} for doc in map(json.loads, lines)]
