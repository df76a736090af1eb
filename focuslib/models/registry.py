"""The VLM adapters, by name, and loading by that name. A new VLM is one file here and one entry below."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from focuslib.errors import UserError, pick
from focuslib.models.base import VLM
from focuslib.models.checkpoint import read_json, resolve_folder
from focuslib.models.hf import HfVLM, label_of
from focuslib.models.llava_onevision import LlavaOnevision
from focuslib.models.llava_video import LlavaVideo
from focuslib.models.minicpmv import MiniCPMV
from focuslib.models.qwen2_5_vl import Qwen25VL
from focuslib.models.tiny import TinyOnevision

MODELS: dict[str, type[VLM]] = {
    vlm.name: vlm for vlm in (LlavaVideo, LlavaOnevision, MiniCPMV, Qwen25VL, TinyOnevision, HfVLM)
}

DTYPES = ("auto", "float32", "bfloat16", "float16")


def named(model: str, checkpoint: str | None = None) -> tuple[str, str | None]:
    """What cells and tables call a model, and its checkpoint; None: the published one of its adapter.

    model: an adapter's name; a checkpoint for the adapter hf, as a hub id or a folder (there is a slash in it); or any
    name for one that is given beside it. A checkpoint of hf is called by its short name, the last part of such a path.

    Raises UserError for a name that is none of these.
    """
    if model in MODELS and model != HfVLM.name:
        return model, checkpoint
    called = checkpoint if model == HfVLM.name else model
    if not called:
        raise UserError(f"{model}: name a checkpoint, a folder or hub id such as Qwen/Qwen3-VL-8B-Instruct")
    if not checkpoint and "/" not in model:
        pick(MODELS, model, "model")
    label = label_of(called)
    return (f"{HfVLM.name}-{label}" if label in MODELS else label), checkpoint or model


def adapter_of(model: str) -> type[VLM]:
    """The adapter of a model that `named` has named."""
    return MODELS.get(model, HfVLM)


def load(checkpoint: str | Path, **settings) -> VLM:
    """Load any checkpoint: a folder, a hub id in the cache, or an adapter's name.

    The published checkpoints get the adapters that keep their published prompt and frames, all others the adapter hf.
    settings: of `load_vlm`.

    Examples
    --------
    >>> vlm = load("Qwen/Qwen3-VL-8B-Instruct")  # doctest: +SKIP
    >>> vlm.generate("clip.mp4", "What happens?")  # doctest: +SKIP
    """
    for name, adapter in MODELS.items():
        if str(checkpoint) in (name, adapter.checkpoint):
            return load_vlm(name, **settings)
    folder = resolve_folder(checkpoint)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in CONFIG_MAPPING:  # an original layout, that only a published adapter reads
        for name, adapter in MODELS.items():
            try:
                adapter.architecture(folder, raw)
            except UserError:
                continue
            return load_vlm(name, str(folder), **settings)
    return load_vlm(HfVLM.name, str(checkpoint), **settings)


def load_vlm(
    name: str, pretrained: str | None = None, *, device: str | None = None, dtype: str = "auto", **settings
) -> VLM:
    """Load a VLM by adapter name.

    Parameters
    ----------
    name
        A key of MODELS, such as "llava_vid"; or as `named` takes it.
    pretrained
        A checkpoint folder, or a hub id in the cache; None: the published checkpoint.
    device
        None takes the GPU if there is one.
    dtype
        One of DTYPES.
    settings
        Further arguments of `VLM.load`.

    Raises
    ------
    UserError
        For an unknown name, device or dtype, and as `VLM.load`.
    """
    name, pretrained = named(name, pretrained)
    adapter = adapter_of(name)
    if adapter is HfVLM:
        settings["label"] = name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; write cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: no CUDA GPU here; take --device cpu (device: cpu in a parameter file)")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    return adapter.load(pretrained, device=device, dtype=dtype, **settings)
