"""Builds the benchmark's videos and questions once, into a cache folder: a minute of work, a few megabytes.

The folder's name carries a digest of everything that decides its content, so a change of the scenes never meets old
videos.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from focuslib.errors import UserError
from focuslib.tasks.build_once import build_once
from focuslib.tasks.tinyvideo.questions import TASKS, questions
from focuslib.tasks.tinyvideo.scenes import FPS, SIZE, render, sample_scene

CLIPS = {"tune": 68, "test": 160}  # clips of a task with three questions each; a task with two has half as many again
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

    Each is a dict of strings and one list: id, video (path relative to the built folder), question, options (four
    words), answer (a letter), answer_text, question_type. Every clip is asked one question of each type it allows;
    the right letters go round A to D, in shuffled fours, so that they are balanced.
    """
    rng = np.random.default_rng((3, list(CLIPS).index(split), list(TASKS).index(task)))
    docs, positions = [], []
    per_clip = 3 if len(TASKS[task]) == 1 else 2
    for kind, types in TASKS[task].items():
        for index in range(3 * CLIPS[split] // per_clip // len(TASKS[task])):
            scene = sample_scene(split, kind, index)
            pool = [q for q in questions(scene) if q.type in types]
            chosen = [
                rng.choice([i for i, q in enumerate(pool) if q.type == t])
                for t in types
                if any(q.type == t for q in pool)
            ]
            chosen += [i for i in range(len(pool)) if i not in chosen][: per_clip - len(chosen)]
            for number, i in enumerate(chosen):
                positions = positions or rng.permutation(4).tolist()
                options, letter = pool[i].options(rng, positions.pop())
                docs.append(
                    {
                        "id": f"{task}-{split}-{kind}-{index:04d}-{number}",
                        "video": f"videos/{split}-{kind}-{index:04d}.mp4",
                        "question": pool[i].text,
                        "options": options,
                        "answer": letter,
                        "answer_text": pool[i].answer,
                        "question_type": pool[i].type,
                    }
                )
    return deal(docs, rng)


def deal(docs: list[dict], rng: np.random.Generator) -> list[dict]:
    """Shuffle questions so that a limit, which takes the first ones, is a stratified sample of their types.

    Of a type that has n of N questions, the first k hold k·n / N, to within one.
    """
    counts = Counter(doc["question_type"] for doc in docs)
    shuffled = [docs[i] for i in rng.permutation(len(docs))]
    dealt: Counter[str] = Counter()
    places = []
    for doc in shuffled:
        kind = doc["question_type"]
        places.append(((dealt[kind] + 0.5) / counts[kind], kind))
        dealt[kind] += 1
    return [shuffled[i] for i in sorted(range(len(docs)), key=places.__getitem__)]


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
        stream.options = {"crf": "18", "preset": "fast"} if codec == "libx264" else {"qscale": "2"}
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
        for split in CLIPS:
            docs = task_docs(task, split)
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
            videos.update(d["video"] for d in docs)
    for video in tqdm(sorted(videos), desc="building the tinyvideo benchmark", unit="clip"):
        split, kind, index = Path(video).stem.split("-")
        write_video(folder / video, render(sample_scene(split, kind, int(index))))


def load_docs(task: str, split: str, root: Path | None = None) -> list[dict]:
    """The docs of one task and split with absolute video paths, building the benchmark first if need be."""
    folder = build(root)
    lines = (folder / f"{task}_{split}.jsonl").read_text().splitlines()
    return [{**doc, "video": str(folder / doc["video"])} for doc in map(json.loads, lines)]
