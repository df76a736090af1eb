"""Renders the benchmark's pictures once, into a cache folder: seconds of work, lossless, from tinyvideo's scenes."""

import hashlib
import json
from pathlib import Path

from PIL import Image

from focuslib.tasks.build_once import build_once
from focuslib.tasks.tinyvideo import build as tinyvideo
from focuslib.tasks.tinyvideo.scenes import render, sample_scene

FRAME = 4  # of the eight frames of an attributes clip, all of which show all that is asked
SPLITS = ("tune", "test")


def version() -> str:
    """A digest of everything that decides what the pictures and questions are."""
    return hashlib.sha256(tinyvideo.version().encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def build(root: Path | None = None) -> Path:
    """The folder with the pictures and `<split>.jsonl`, built now if it is not there yet."""
    return build_once((root or tinyvideo.cache_root().parent / "tinyimage") / version(), _fill)


def _fill(folder: Path) -> None:
    for split in SPLITS:
        docs = [_image_doc(doc) for doc in tinyvideo.task_docs("attributes", split)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        for name in {doc["image"] for doc in docs}:
            index = int(Path(name).stem.split("-")[1])
            Image.fromarray(render(sample_scene(split, "attributes", index))[FRAME]).save(folder / name)


def _image_doc(doc: dict) -> dict:
    """A question about a clip (tinyvideo.build.task_docs) as one about its picture."""
    split, _, index = Path(doc["video"]).stem.split("-")
    rest = {key: value for key, value in doc.items() if key != "video"}
    return {**rest, "image": f"{split}-{index}.png"}


def load_docs(split: str, root: Path | None = None) -> list[dict]:
    """The questions of one split with absolute picture paths, built first if need be."""
    folder = build(root)
    lines = (folder / f"{split}.jsonl").read_text().splitlines()
    return [{**doc, "image": str(folder / doc["image"])} for doc in map(json.loads, lines)]
