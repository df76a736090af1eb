"""Any image-text-to-text checkpoint of the hub in the transformers layout: its own class, processor and chat template.

Which tokens are visual, and how they lie, is read from the processor's placeholders (see placeholders). Whether the
patch computes the model exactly is what the first prefill checks (see prefill.selfcheck).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.video_utils import VideoMetadata

from focuslib.errors import InputError, UserError
from focuslib.grid import Grid
from focuslib.models.base import VLM, Inputs, Media, Prompt
from focuslib.models.checkpoint import Architecture, read_json, resolve_folder
from focuslib.models.layout import TokenLayout, fitted, frame_names, grid_layout
from focuslib.models.media import Clip, FrameSampling
from focuslib.models.placeholders import Shown, grid_of, runs_of
from focuslib.prefill.decoder import find_decoder

TICKS = 1_000_000  # a second in VideoMetadata, which counts frames at a fixed rate: so any times can be said
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
CODE = "needs code of its own (trust_remote_code), which is never run here"


class HfVLM(VLM):
    """A checkpoint of the hub by its own class and processor; several images and videos a prompt.

    name: the checkpoint's label, by which tables and settings know it. sampling: frames spread over a video, two a
    second and at most 32 unless told otherwise.
    """

    name = "hf"
    several_media = True
    checkpoint = ""  # there is no published one
    default_sampling = FrameSampling(max_frames=32, per_second=2)

    def __init__(self, model: PreTrainedModel, processor: Any, sampling: FrameSampling):
        super().__init__(model, processor.tokenizer, sampling)
        self.processor = processor

    @classmethod
    def load(cls, pretrained: str | Path | None = None, *, label: str | None = None, **settings: Any) -> HfVLM:
        """As VLM.load. label: what tables call the checkpoint; None: its short name."""
        if not pretrained:
            raise UserError(f"{cls.name}: name a checkpoint, a folder or hub id such as Qwen/Qwen3-VL-8B-Instruct")
        vlm = super().load(pretrained, **settings)
        assert isinstance(vlm, HfVLM)
        vlm.name = label or label_of(pretrained)
        return vlm

    @classmethod
    def without_weights(cls, pretrained: str | Path, **sampling: Any) -> HfVLM:
        """A checkpoint as far as its files but the weights say it: for prompts and grids. sampling: frames, fps."""
        folder = resolve_folder(pretrained)
        architecture, processor = cls.architecture(folder, read_json(folder / "config.json")), load_processor(folder)
        with torch.device("meta"):
            model = architecture.model_class(architecture.config)
        vlm = cls(model, processor, cls.default_sampling.changed(**sampling))
        vlm.name = label_of(pretrained)
        return vlm

    @classmethod
    def architecture(cls, folder: Path, raw: dict[str, Any]) -> Architecture:
        family = raw.get("model_type")
        if family not in CONFIG_MAPPING:
            hint = "take one in the transformers layout (its name often ends in -HF or -hf)"
            if "auto_map" in raw:
                raise UserError(f"{folder}: its model {CODE}; {hint}")
            raise UserError(f"{folder}: transformers {transformers.__version__} knows no model type {family!r}; {hint}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = AutoModelForImageTextToText._model_mapping.get(type(config), None)
        if isinstance(model_class, (tuple, list)):
            model_class = model_class[0]
        if model_class is None:
            raise UserError(f"{folder}: a {family} is no model that answers about images or videos")
        return Architecture(model_class, config)

    @classmethod
    def kept_modules(cls, architecture: Architecture) -> tuple[str, ...]:
        with torch.device("meta"):
            model = architecture.model_class(architecture.config)
        decoder = set(find_decoder(model).modules())
        children = {
            f"{outer}{name}": module
            for outer, holder in (("", model), ("model.", getattr(model, "model", model)))
            for name, module in holder.named_children()
        }
        return tuple(name for name, module in children.items() if decoder.isdisjoint(module.modules()))

    @classmethod
    def load_tokenizer(cls, folder: Path) -> Any:
        """The processor, which brings the tokenizer."""
        return load_processor(folder)

    def prepare(self, media: Media | Sequence[Media] | None, prompt: Prompt) -> Inputs:
        """Inputs for a prompt about any number of images and videos.

        prompt: a text, which follows the media; or one in which each <image> or <video> stands for the next medium; or
        chat content, a list of {"type": "text", "text": …} and {"type": "image"} or {"type": "video"}.
        """
        opened = [self.clip(medium) for medium in media_list(media)]
        parts = content(prompt, len(opened))
        kinds = ["video" if isinstance(medium, Clip) else "image" for medium in opened]
        self._check_kinds(kinds)
        numbers = iter(kinds)
        parts = [part if part["type"] == "text" else {"type": next(numbers)} for part in parts]
        ready = self._process(parts, opened)
        offsets = ready.pop("text_replacement_offsets", None)
        tensors = {name: self._to_model(value, "pixel" in name) for name, value in ready.items()}
        if not opened:
            return Inputs(tensors, None)
        return Inputs(tensors, *self._grid(ready, offsets[0] if offsets else None, opened))

    def drawing(self, media: Media | Sequence[Media], inputs: Inputs) -> tuple[np.ndarray, TokenLayout]:
        """Each frame of the grid on the first of the video's frames that it stands for."""
        assert inputs.grid is not None
        opened = [self.clip(medium) for medium in media_list(media)]
        pictures: list[np.ndarray] = []
        for owner, frames in zip(inputs.shown, inputs.grid.media, strict=True):
            medium = opened[owner]
            seen = medium.frames if isinstance(medium, Clip) else np.asarray(medium)[None]
            pictures += [seen[frame * len(seen) // len(frames)] for frame in range(len(frames))]
        names = frame_names(inputs.grid, medium_names(opened, inputs.shown))
        return fitted(pictures, replace(grid_layout(inputs.grid), names=names))

    def _check_kinds(self, kinds: list[str]) -> None:
        processors: dict[str, Any] = {
            kind: getattr(self.processor, f"{kind}_processor", None) for kind in sorted(set(kinds))
        }
        for kind, processor in processors.items():
            if processor is None:
                raise InputError(f"{self.name} takes no {kind}s; give {'images' if kind == 'video' else 'videos'}")
        names = [set(processor.model_input_names) for processor in processors.values()]
        if len(names) == 2 and names[0] & names[1]:  # SmolVLM: one kind's pixels would take the place of the other's
            raise InputError(f"{self.name} takes images or videos, not both in one prompt")

    def _process(self, parts: list[dict[str, Any]], opened: list[Image.Image | Clip]) -> dict[str, Any]:
        """The processor's tensors of a prompt. Raises InputError for media that it cannot take."""
        processor, texts = self.processor, "".join(part.get("text", "") for part in parts)
        for kind in ("image", "video"):
            token = getattr(processor, f"{kind}_token", None)
            if token and token in texts:
                raise InputError(f"the prompt itself holds {kind} markers ({token}), and not one a medium; remove them")
        clips = [medium for medium in opened if isinstance(medium, Clip)]
        options: dict[str, Any] = {"return_tensors": "pt", "return_text_replacement_offsets": bool(opened)}
        if images := [medium for medium in opened if not isinstance(medium, Clip)]:
            options["images"] = [images]
        if clips:
            options |= {
                "videos": [[torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips]],
                "video_metadata": [[metadata(clip) for clip in clips]],
                "do_sample_frames": False,
            }
        try:
            messages = [{"role": "user", "content": parts}]
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            beginning = processor.tokenizer.bos_token
            if beginning and text.startswith(beginning):  # the template has written it
                options["add_special_tokens"] = False
            return dict(processor(text=[text], **options))
        except (ValueError, TypeError, IndexError, KeyError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"{self.name}: its processor refuses the prompt: {why}") from error

    def _grid(
        self, ready: Mapping[str, Any], offsets: list[dict[str, Any]] | None, opened: list[Image.Image | Clip]
    ) -> tuple[Grid, tuple[int, ...]]:
        """The grid of a processed prompt (see placeholders.grid_of)."""
        rows = torch.isin(ready["input_ids"][0], torch.tensor(self.placeholder_ids)).nonzero().flatten()
        if offsets is None:  # a processor that does not say what it wrote
            texts, counts = [""] * len(opened), [len(rows) // len(opened)] * len(opened)
        else:
            texts = [offset["replacement"] for offset in offsets]
            tokens = {getattr(self.processor, f"{kind}_token", None) or "\0" for kind in ("image", "video")}
            counts = [sum(text.count(token) for token in tokens) for text in texts]
        if sum(counts) != len(rows) or len(counts) != len(opened) or not all(counts):
            raise InputError(f"{self.name}: {len(rows)} visual tokens, but placeholders for {counts} of the media")
        shown, numbers = [], {"image": 0, "video": 0}
        for medium, text, own in zip(opened, texts, rows.split(counts), strict=True):
            kind = "video" if isinstance(medium, Clip) else "image"
            size = medium.frames.shape[1:3] if isinstance(medium, Clip) else (medium.height, medium.width)
            frames = len(medium.frames) if isinstance(medium, Clip) else 0
            shown.append(Shown(numbers[kind], frames, size, text, runs_of(own)))
            numbers[kind] += 1
        return grid_of(shown, ready, self.processor, self.model.config)

    @property
    def placeholder_ids(self) -> list[int]:
        """The token ids that the model replaces by visual features."""
        holders = (self.model.config, self.processor)
        found = {getattr(holder, name, None) for name in PLACEHOLDERS for holder in holders}
        ids = sorted(value for value in found if isinstance(value, int) and value >= 0)
        if not ids:
            raise UserError(f"{self.name}: its config names no placeholder of images (image_token_id)")
        return ids

    def _to_model(self, value: Any, pixels: bool) -> Any:
        """Tensors on the model's device; pixels in its dtype, but no times, which would lose too much."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._to_model(item, pixels) for item in value)
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if pixels and value.is_floating_point() else None)


def load_processor(folder: Path) -> Any:
    """The processor of a checkpoint folder. Raises UserError if it has none, or none that runs without its own code."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:  # a package that this family alone needs
        why = " ".join(str(error).split())
        raise UserError(f"{folder}: its processor needs a package: {why[:200]}; pip install 'focuslib[hf]'") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())
        why = f"its processor {CODE}" if "trust_remote_code" in why else f"its processor cannot be built ({why[:200]})"
        raise UserError(f"{folder}: {why}; is it a whole checkpoint in the transformers layout?") from error
    if not hasattr(processor, "tokenizer") or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{folder}: has no processor of images (preprocessor_config.json); download it again")
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    if processor.chat_template is None:
        raise UserError(f"{folder}: has no chat template (chat_template.jinja); add the family's own to the folder")
    return processor


def label_of(checkpoint: str | Path) -> str:
    """The short name of a checkpoint, for tables and file names: the last part of its hub id or folder."""
    path = Path(str(checkpoint).rstrip("/"))
    name = path.name
    if path.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/<revision>
        name = path.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^\w.-]+", "-", name) or "hf"


def media_list(media: Any) -> list[Media]:
    """None, one medium or several, as a list. Frames as an array are one medium, a list of arrays several."""
    if media is None:
        return []
    return list(media) if isinstance(media, (list, tuple)) else [media]


def medium_names(opened: list[Image.Image | Clip], shown: tuple[int, ...]) -> list[str]:
    """What each medium of a grid is called, that shows these of the prompt's images and videos: "image 2", by kind."""
    kinds = ["video" if isinstance(medium, Clip) else "image" for medium in opened]
    names = [f"{kind} {kinds[: number + 1].count(kind)}" for number, kind in enumerate(kinds)]
    parts = [shown[: number + 1].count(owner) for number, owner in enumerate(shown)]
    return [
        f"{names[owner]}, part {part}" if shown.count(owner) > 1 else names[owner]
        for owner, part in zip(shown, parts, strict=True)
    ]


def content(prompt: Prompt, media: int) -> list[dict[str, Any]]:
    """Chat content: text and places of media, in order; media: how many there are.

    Raises InputError unless each medium has its place.
    """
    if isinstance(prompt, str):
        pieces = re.split(r"<image>|<video>", prompt)
        if media == 0 or len(pieces) - 1 != media:
            return [{"type": "medium"}] * media + [{"type": "text", "text": prompt}]
        between = [[{"type": "medium"}, {"type": "text", "text": piece}] for piece in pieces[1:]]
        parts = [{"type": "text", "text": pieces[0]}, *(part for pair in between for part in pair)]
        return [part for part in parts if part.get("text") != ""]
    parts = [dict(part) for part in prompt]
    if unknown := {part.get("type") for part in parts} - {"text", "image", "video"}:
        raise InputError(f"chat content of type {sorted(map(str, unknown))[0]}; write text, image or video")
    places = sum(part["type"] != "text" for part in parts)
    if places != media:
        raise InputError(f"{places} places for media in the chat content, and {media} media")
    return parts


def metadata(clip: Clip) -> VideoMetadata:
    """When a clip's frames are shown, as processors take it."""
    height, width = clip.frames.shape[1:3]
    indices = np.round(np.array(clip.times) * TICKS).astype(int).tolist()
    return VideoMetadata(
        total_num_frames=max(1, round(clip.duration * TICKS)), fps=TICKS, width=width, height=height,
        duration=clip.duration, frames_indices=indices,
    )  # fmt: skip
