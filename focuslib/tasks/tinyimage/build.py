"""Renders the benchmark's pictures once, into a cache folder: seconds of work, lossless, from tinyvideo's scenes."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from focuslib.tasks.tinyvideo import build as tinyvideo
from focuslib.tasks.tinyvideo.scenes import render, sample_scene

FRAME = 4  # of the eight frames of an attributes clip, all of which show all that is asked
SPLITS = ("tune", "test")


def version() -> str:
    """A digest of everything that decides what the pictures and questions are."""
    return hashlib.sha256(tinyvideo.version().encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def build(root: Path | None = None) -> Path:
    """The folder with the pictures and `<split>.jsonl`, built now if it is not there yet; safe from many processes."""
    target = (root or tinyvideo.cache_root().parent / "tinyimage") / version()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        for split in SPLITS:
            docs = [_image_doc(doc) for doc in tinyvideo.task_docs("attributes", split)]
            (work / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
            for name in {doc["image"] for doc in docs}:
                index = int(Path(name).stem.split("-")[1])
                Image.fromarray(render(sample_scene(split, "attributes", index))[FRAME]).save(work / name)
        os.chmod(work, 0o755)  # mkdtemp makes it private
        try:
            work.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


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
