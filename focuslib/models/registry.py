"""The VLM adapters, by name, and loading by that name. A new VLM is one file here and one entry below."""

import torch

from focuslib.errors import UserError, pick
from focuslib.models.base import VLM
from focuslib.models.llava_onevision import LlavaOnevision
from focuslib.models.llava_video import LlavaVideo
from focuslib.models.minicpmv import MiniCPMV
from focuslib.models.qwen2_5_vl import Qwen25VL
from focuslib.models.tiny import TinyOnevision

MODELS: dict[str, type[VLM]] = {
    vlm.name: vlm for vlm in (LlavaVideo, LlavaOnevision, MiniCPMV, Qwen25VL, TinyOnevision)
}

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_vlm(
    name: str, pretrained: str | None = None, *, device: str | None = None, dtype: str = "auto", **settings
) -> VLM:
    """Load a VLM by adapter name.

    Parameters
    ----------
    name
        A key of MODELS, such as "llava_vid".
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
    adapter = pick(MODELS, name, "model")
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
