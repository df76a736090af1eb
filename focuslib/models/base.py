"""What every VLM adapter offers: load a checkpoint, turn media and a prompt into inputs, say their visual grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from focuslib.errors import UserError
from focuslib.grid import Grid
from focuslib.models.checkpoint import Architecture, load_model, read_json, resolve_folder
from focuslib.models.features import FeatureStore
from focuslib.models.fingerprint import fingerprint
from focuslib.models.layout import TokenLayout, grid_layout
from focuslib.models.media import Clip, FrameSampling, is_image_file, read_clip, read_image, to_rgb
from focuslib.models.quantize import int8_config
from focuslib.prefill.handover import handed_over

# A video or image file, a folder of frames, an image, an image [H, W, 3] uint8, frames [F, H, W, 3] uint8, or frames
# with their times.
Media = str | Path | Image.Image | np.ndarray | Clip
# A text, or (adapters that take several media) chat content: texts and places of media, in order.
Prompt = str | Sequence[Mapping[str, Any]]

# The prompt around the user's words in the Qwen2 chat format, which all four published models use.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Inputs:
    """One prompt, ready for the model.

    Attributes
    ----------
    tensors
        Keyword arguments of the model's forward or generate.
    grid
        Where its visual tokens sit; None: no media.
    shown
        For each medium of the grid, the number of the prompt's image or video that it shows, where they are several: a
        picture's tiles and its thumbnail are two media of the grid.
    """

    tensors: dict[str, Tensor]
    grid: Grid | None
    shown: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Needs:
    """What a worker that holds a model takes of a machine. gpus: none on a device "cpu". memory_gb: main memory."""

    gpus: int = 1
    memory_gb: float = 32


class VLM:
    """A loaded vision-language model. Subclasses implement `architecture` and `prepare`.

    generation: arguments of generate that this model's published evaluation keeps.
    output_head: the module that quantization leaves alone. vision_modules: the tower and the projector.
    store: what keeps clips and features from one prompt to the next; None: nothing is kept.
    """

    name: str
    several_media: ClassVar[bool] = False  # whether a prompt may hold more than one image or video
    checkpoint: ClassVar[str]  # the published checkpoint, a hub id
    default_sampling: ClassVar[FrameSampling]
    generation: Mapping[str, Any] = MappingProxyType({})
    output_head: ClassVar[str] = "lm_head"
    vision_modules: ClassVar[tuple[str, ...]]
    needs: ClassVar[Needs] = Needs()

    folder: Path | None = None  # of the checkpoint, where it was loaded from one
    quantization: str | None = None
    store: FeatureStore | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, sampling: FrameSampling):
        self.model: Any = model.eval()  # whose attributes are its family's
        self.tokenizer = tokenizer
        self.sampling = sampling

    @classmethod
    def load(
        cls,
        pretrained: str | Path | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        device_map: Any = None,
        sampling: FrameSampling | None = None,
        frames: int | None = None,
        fps: float | None = None,
        quantization: Any = None,
        **options: Any,
    ) -> VLM:
        """Load a checkpoint, without a network.

        Parameters
        ----------
        pretrained
            A checkpoint folder, or a hub id in the cache; None: the published checkpoint.
        dtype, device, device_map
            See `checkpoint.load_model`.
        sampling
            Which frames of a video are seen; None: the published rule.
        frames, fps
            The most frames of a video, and how many a second, instead of those of the sampling.
        quantization
            None, "int8" (LLM.int8 of every linear layer but the output head, as published), "int8_llm" (of the language
            model alone), or a transformers quantization config.
        options
            Of the family's `architecture`.

        Raises
        ------
        UserError
            For a checkpoint of another family, a half-downloaded one, or parameters that do not fit.

        Examples
        --------
        >>> vlm = TinyOnevision.load()  # doctest: +SKIP
        >>> vlm.generate("clip.mp4", "What happens?")  # doctest: +SKIP
        """
        folder = resolve_folder(pretrained or cls.checkpoint)
        architecture = cls.architecture(folder, read_json(folder / "config.json"), **options)
        config = quantization
        if quantization in ("int8", "int8_llm"):
            keep = cls.kept_modules(architecture) if quantization == "int8_llm" else ()
            config = int8_config((cls.output_head, *keep))
        tokenizer = cls.load_tokenizer(folder)  # before the weights, which take minutes
        model = load_model(folder, architecture, dtype=dtype, device=device, device_map=device_map, quantization=config)
        vlm = cls(model, tokenizer, (sampling or cls.default_sampling).changed(frames, fps))
        vlm.folder, vlm.quantization = folder, str(quantization) if quantization else None
        return vlm

    def identity(self) -> list[str | None]:
        """What decides an answer beside the prompt and the method: adapter, checkpoint's content, dtype, quantization,
        frames.
        """
        content = fingerprint(self.folder) if self.folder else None
        return [self.name, content, str(self.dtype), self.quantization, str(self.sampling)]

    @classmethod
    def architecture(cls, folder: Path, raw: dict[str, Any]) -> Architecture:
        """How to build the model of a config.json. Raises UserError if it is of another family."""
        raise NotImplementedError

    @classmethod
    def kept_modules(cls, architecture: Architecture) -> tuple[str, ...]:
        """What "int8_llm" leaves as it is beside the output head."""
        return cls.vision_modules

    @classmethod
    def load_tokenizer(cls, folder: Path) -> PreTrainedTokenizerBase | None:
        """The tokenizer in a checkpoint folder; None if it has none (then only ready-made inputs can be run)."""
        if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
            return None
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    def prepare(self, media: Any, prompt: Any) -> Inputs:
        """Inputs for one prompt (a text) about one video or image (Media) or none.

        Where `several_media`: also about a list of them, and the prompt may be chat content (Prompt).
        """
        raise NotImplementedError

    def layout(self, grid: Grid, size: tuple[int, int]) -> TokenLayout:
        """Where the visual tokens of media of `size` (height, width) lie in its pictures, for drawing."""
        return grid_layout(grid)

    def drawing(self, media: Any, inputs: Inputs) -> tuple[np.ndarray, TokenLayout]:
        """The pictures that a prompt's visual tokens stand for, [F, H, W, 3] uint8, and where they lie in them."""
        assert inputs.grid is not None
        frames = self.frames(media)
        return frames, self.layout(inputs.grid, frames.shape[1:3])

    def open(self, media: Media) -> Image.Image | np.ndarray:
        """An RGB image, or the sampled frames of a video [F, H, W, 3] uint8."""
        opened = self.clip(media)
        return opened.frames if isinstance(opened, Clip) else opened

    def clip(self, media: Media) -> Image.Image | Clip:
        """An RGB image, or the sampled frames of a video with their times.

        Frames without times are taken to be the candidates of the model's sampling, one after another.
        """
        if isinstance(media, Clip):
            return media
        if isinstance(media, Image.Image):
            return to_rgb(media)
        if isinstance(media, (str, Path)):
            if is_image_file(media):
                return read_image(media)
            return read_clip(media, self.sampling) if self.store is None else self.store.clip(media, self.sampling)
        array = np.asarray(media)
        if array.ndim not in (3, 4) or array.shape[-1] != 3 or array.dtype != np.uint8 or array.size == 0:
            raise UserError(
                f"media of shape {array.shape} and type {array.dtype}; "
                "give frames [F, H, W, 3] or an image [H, W, 3], uint8"
            )
        if array.ndim == 3:
            return Image.fromarray(array)
        rate = self.sampling.per_second or 1.0
        return Clip(array, tuple(index / rate for index in range(len(array))), len(array) / rate)

    def frames(self, media: Media) -> np.ndarray:
        """As `open`, an image being a video of one frame: [F, H, W, 3] uint8."""
        opened = self.open(media)
        return np.asarray(opened)[None] if isinstance(opened, Image.Image) else opened

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a piece of the prompt, no special tokens added."""
        return self.needed_tokenizer()(text, add_special_tokens=False).input_ids

    def decode(self, ids: Tensor) -> str:
        """The text of new token ids [N]."""
        return str(self.needed_tokenizer().decode(ids, skip_special_tokens=True)).strip()

    def needed_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises UserError if the checkpoint has none."""
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer files; add them to its folder")
        return self.tokenizer

    def inputs_from_embeds(self, embeds: Tensor, grid: Grid | None) -> Inputs:
        """Inputs of ready-made embeddings [T, D]."""
        mask = torch.ones((1, len(embeds)), dtype=torch.long, device=embeds.device)
        return Inputs({"inputs_embeds": embeds[None], "attention_mask": mask}, grid)

    def running(self, inputs: Inputs) -> AbstractContextManager[None]:
        """Inside a method's block: tells it the grid of what you run yourself, `vlm.model(**inputs.tensors)`."""
        return handed_over(self.model, inputs.grid)

    @torch.inference_mode()
    def prefill(self, inputs: Inputs) -> Tensor:
        """Run the prompt once, without a cache: the logits [1, T, vocabulary] of the tokens that reach the end."""
        with self.running(inputs):
            return self.model(**inputs.tensors, use_cache=False).logits

    @torch.inference_mode()
    def generate_ids(self, inputs: Inputs, max_new_tokens: int = 16, **generation: Any) -> Tensor:
        """Generate greedily (unless told otherwise): the new token ids [N] int64."""
        prompt = inputs.tensors.get("input_ids")
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **self.generation, **generation}
        with self.running(inputs):
            ids = self.model.generate(**inputs.tensors, **settings)[0]
        return ids if prompt is None else ids[prompt.shape[1] :]

    def generate(self, media: Any, prompt: Any, max_new_tokens: int = 16, **generation: Any) -> str:
        """Answer a prompt about a video or an image: see `prepare` for what the adapter takes."""
        return self.decode(self.generate_ids(self.prepare(media, prompt), max_new_tokens, **generation))
