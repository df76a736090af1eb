"""Tiny replicas of the four published checkpoints and the six data sets, in their real formats, made in seconds.

Checkpoints: the golden ones (vlm_oracle) with their decoder layers repeated to 28, as the published settings need, a
smaller vision tower, and a tokenizer; their answers are one letter, sometimes y or n. Data sets: the caches and folders
that the unmodified lmms-eval tasks read offline, with a few questions each.
"""

import io
import json
import re
from pathlib import Path

import av
import numpy as np
import tiny_families
import torch
from datasets import DatasetInfo, Features, Image, Sequence, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as Pillow
from safetensors.numpy import save_file
from tiny_tokenizer import write_tokenizer
from transformers import AutoTokenizer
from vlm_oracle import read_config, read_weights

from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.sources import Source, sources
from focuslib.models import Qwen25VL

FAMILIES = {
    "llava_vid": "llava_video",
    "llava_onevision": "llava_onevision",
    "minicpm_v": "minicpmv",
    "qwen2_5_vl": "qwen2_5_vl",
}
LAYERS = 28
TOWER = {"image_size": 20, "patch_size": 4}  # of the LLaVAs: 5 × 5 patches a frame or tile, 3 × 3 or 2 × 2 tokens
ANSWERS = "ABCDyn"
FIRM = 100.0  # how firmly an answer ends after its first letter


def write_checkpoints(folder: Path) -> dict[str, str]:
    """All four checkpoints; returns model name → folder, as the `checkpoints` parameter wants it."""
    return {name: str(write_checkpoint(name, folder / name)) for name in FAMILIES}


def write_modern(folder: Path) -> dict[str, str]:
    """The checkpoints of the modern profile with its three processors; returns hub id → folder."""
    families = {
        "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
        "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
        "OpenGVLab/InternVL3_5-8B-HF": "internvl",
    }
    return {
        hub: str(tiny_families.write_checkpoint(name, folder / hub.split("/")[1], num_hidden_layers=LAYERS))
        for hub, name in families.items()
    }


def write_checkpoint(name: str, folder: Path) -> Path:
    """One checkpoint in its published layout."""
    folder.mkdir(parents=True)
    config, weights = read_config(FAMILIES[name]), read_weights(FAMILIES[name])
    rng = np.random.default_rng(0)
    write_tokenizer(folder)
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids
    ends = {"eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>")}
    config |= ends
    if name == "qwen2_5_vl":
        weights |= _stock_tower(config)
    elif name.startswith("llava"):
        _shrink_tower(config, weights, folder, rng)
    weights = _repeat_layers(weights, config["num_hidden_layers"])
    config["num_hidden_layers"] = config["max_window_layers"] = LAYERS
    _answer_in_a_letter(weights, token, rng)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    save_file(weights, folder / "model.safetensors")
    return folder


def _repeat_layers(weights: dict[str, np.ndarray], present: int) -> dict[str, np.ndarray]:
    pattern = re.compile(r"^((?:llm\.)?model\.layers\.)(\d+)(\..*)$")
    repeated = {}
    for name, value in weights.items():
        if match := pattern.match(name):
            start, layer, rest = match.groups()
            repeated |= {f"{start}{copy}{rest}": value for copy in range(int(layer), LAYERS, present)}
        else:
            repeated[name] = value
    return repeated


def _shrink_tower(config: dict, weights: dict[str, np.ndarray], folder: Path, rng: np.random.Generator) -> None:
    """Fewer patches: a tower of its own beside the checkpoint, as the original's `mm_vision_tower` may name one."""
    tower = config.pop("_tiny_vision_config") | TOWER
    config["mm_vision_tower"] = "vision_tower"
    side, patch = TOWER["image_size"], TOWER["patch_size"]
    config["image_grid_pinpoints"] = [[side * h, side * w] for h in range(1, 7) for w in range(1, 7)]
    start = "model.vision_tower.vision_tower.vision_model.embeddings."
    width = tower["hidden_size"]
    for name, shape in (
        ("patch_embedding.weight", (width, 3, patch, patch)),
        ("position_embedding.weight", ((side // patch) ** 2, width)),
    ):
        weights[start + name] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    (folder / "vision_tower").mkdir()
    (folder / "vision_tower" / "config.json").write_text(json.dumps({"vision_config": tower}))


def _stock_tower(config: dict) -> dict[str, np.ndarray]:
    """The vision tower of Qwen2.5-VL, which the golden checkpoint leaves out."""
    architecture = Qwen25VL.architecture(None, config)
    torch.manual_seed(0)
    tower = architecture.model_class(architecture.config).model.visual
    return {f"visual.{name}": value.numpy() for name, value in tower.state_dict().items()}


def _answer_in_a_letter(weights: dict[str, np.ndarray], token, rng: np.random.Generator) -> None:
    """Make the prompt decide on one of ANSWERS, and the answer end after it.

    One direction of the embeddings tells an answer's letters from the line break before it; the head ends the answer
    on the former's side of it. Across it the head's rows are random, and the prompt decides.
    """
    embedding = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
    head = next(value for name, value in weights.items() if name.endswith("lm_head.weight"))
    letters = [token(letter) for letter in ANSWERS]
    direction = rng.standard_normal(embedding.shape[1]).astype(np.float32)
    direction /= np.linalg.norm(direction)
    embedding[letters] += FIRM * direction
    embedding[token("\n")] -= FIRM * direction
    head[:] = 0
    rows = rng.standard_normal((len(letters) // 2, len(direction))).astype(np.float32)
    rows = np.concatenate([rows, -rows])  # so that one of the letters always beats the other tokens
    head[letters] = rows - np.outer(rows @ direction, direction)
    head[token("<|im_end|>")] = 10 * direction


def write_datasets(hf_home: Path) -> None:
    """All six data sets, under what is to be $HF_HOME."""
    text, number = Value("string"), Value("int32")
    letters = {letter: text for letter in "ABCD"}
    mmbench = {"index": number, "question": text, "hint": text, "answer": text, **letters, "category": text,
               "image": Image(), "source": text, "comment": text, "split": text}  # fmt: skip
    features = {
        "videomme": {"video_id": text, "duration": text, "domain": text, "sub_category": text, "url": text,
                     "videoID": text, "question_id": text, "task_type": text, "question": text,
                     "options": Sequence(text), "answer": text},
        "mlvu": {"video_name": text, "duration": Value("float32"), "question": text, "candidates": Sequence(text),
                 "answer": text, "task_type": text},
        "mvbench": {"video": text, "question": text, "candidates": Sequence(text), "answer": text},
        "vqav2": {"question_type": text, "multiple_choice_answer": text,
                  "answers": [{"answer": text, "answer_confidence": text, "answer_id": Value("int64")}],
                  "image_id": number, "answer_type": text, "question_id": Value("int64"), "question": text,
                  "image": Image()},
        "mme": {"question_id": text, "image": Image(), "question": text, "answer": text, "category": text},
        "mmbench_en_dev": mmbench | {"L2-category": text},
        "mmbench_cn_dev": mmbench | {"L2-category": text},
        "mmbench_ru_dev": mmbench | {"l2-category": text},
    }  # fmt: skip
    makers = {
        "videomme": _videomme,
        "mlvu": _mlvu,
        "mvbench": _mvbench,
        "vqav2": _vqav2,
        "mme": _mme,
        "mmbench": _mmbench,
    }
    for name, make in makers.items():
        for source in sources(DATASETS[name]):
            rows = make(hf_home, source.task)
            _write_cache(hf_home, source, rows, Features(features.get(source.task) or features[name]))


def _write_cache(hf_home: Path, source: Source, rows: list[dict], features: Features) -> None:
    """The Arrow cache that `load_dataset` finds offline."""
    name, config = source.name, source.config or "default"
    folder = hf_home / "datasets" / f"{source.repository.split('/')[0]}___{name}" / config / "0.0.0" / "replica"
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / f"{name}-{source.split}.arrow"), features=features) as writer:
        for row in rows:
            writer.write(features.encode_example(row))
        count, size = writer.finalize()
    splits = SplitDict({source.split: SplitInfo(source.split, num_bytes=size, num_examples=count, dataset_name=name)})
    info = DatasetInfo(features=features, splits=splits, dataset_name=name, config_name=config, version="0.0.0")
    info.write_to_directory(str(folder))


def _videomme(hf_home: Path, task: str) -> list[dict]:
    for video in ("first", "second"):
        write_video(hf_home / "videomme" / "data" / f"{video}.mp4", seed=len(video))
    common = {"duration": "short", "domain": "Knowledge", "sub_category": "Astronomy", "task_type": "Counting Problem"}
    return [
        common | {"video_id": f"00{number}", "url": "", "videoID": video, "question_id": f"00{number}-1",
                  "question": "How many squares move?", "options": ["A. 1", "B. 2", "C. 3", "D. 4"], "answer": answer}
        for number, (video, answer) in enumerate([("first", "A"), ("second", "C"), ("second", "B")])
    ]  # fmt: skip


def _mlvu(hf_home: Path, task: str) -> list[dict]:
    rows = []
    for number, kind in enumerate(("needle", "plotQA")):
        name = f"{kind}/{number}.mp4"
        write_video(hf_home / "mlvu" / name, seed=number)
        question = "What moves?\n(A) a square\n(B) a dot\n(C) a line\n(D) nothing"
        candidates = ["a square", "a dot", "a line", "nothing"]
        rows.append({"video_name": name, "duration": 5.0, "question": question, "candidates": candidates,
                     "answer": "AB"[number], "task_type": kind})  # fmt: skip
    return rows


def _mvbench(hf_home: Path, task: str) -> list[dict]:
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    kind = task.removeprefix("mvbench_")
    folder, name = hf_home / "mvbench_video" / DATA_LIST[kind], f"{kind}.mp4"
    if kind == "episodic_reasoning":  # the one whose videos are folders of frames
        name = kind
        for index, frame in enumerate(frames(count=15)):  # at three a second
            (folder / name).mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(frame).save(folder / name / f"{index:05}.jpg")
    else:
        write_video(folder / name, seed=len(kind))
    candidates = ["left", "right", "up"]
    return [{"video": name, "question": "Which way does the square go?", "candidates": candidates, "answer": "right"}]


def _vqav2(hf_home: Path, task: str) -> list[dict]:
    answers = [{"answer": "y" if n < 6 else "n", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    return [
        {"question_type": "is", "multiple_choice_answer": "y", "answers": answers, "image_id": number,
         "answer_type": "other", "question_id": number, "question": "Is there a square?", "image": picture(number)}
        for number in range(2)
    ]  # fmt: skip


def _mme(hf_home: Path, task: str) -> list[dict]:
    return [
        {"question_id": f"{category}/{category}.png", "image": picture(4), "question": question, "answer": answer,
         "category": category}
        for category in ("existence", "code_reasoning")
        for question, answer in (
            ("Is there a square? Please answer yes or no.", "Yes"), ("Is there a dog? Please answer yes or no.", "No"),
        )
    ]  # fmt: skip


def _mmbench(hf_home: Path, task: str) -> list[dict]:
    category = "l2-category" if "ru" in task else "L2-category"
    return [
        {"index": number, "question": "Which colour is it?", "hint": "nan", "answer": "AC"[number], "A": "red",
         "B": "green", "C": "blue", "D": "grey", "category": "attribute_recognition", category: "perception",
         "image": picture(number), "source": "replica", "comment": "nan", "split": "dev"}
        for number in range(2)
    ]  # fmt: skip


def frames(count: int, seed: int = 0) -> np.ndarray:
    """A square that moves over a still background, [count, 48, 64, 3] uint8."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 255, (1, 48, 64, 3), dtype=np.uint8), count, axis=0)
    for index in range(count):
        left = index * 40 // count
        video[index, 12:30, left : left + 18] = (250, 20, 20)
    return video


def write_video(path: Path, count: int = 25, seed: int = 0) -> None:
    """Frames as an mp4 of 5 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames(count, seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def picture(seed: int) -> dict:
    """An image as data sets store it: 72 × 56 pixels, PNG."""
    buffer = io.BytesIO()
    Pillow.fromarray(frames(1, seed)[0]).resize((72, 56)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
