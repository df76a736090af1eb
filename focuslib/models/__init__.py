"""The VLM adapters, by name. A new VLM is one file here and one entry below."""

from focuslib.models.base import VLM, Inputs
from focuslib.models.llava_onevision import LlavaOnevision
from focuslib.models.llava_video import LlavaVideo
from focuslib.models.minicpmv import MiniCPMV
from focuslib.models.qwen2_5_vl import Qwen25VL
from focuslib.models.tiny import TinyOnevision

MODELS: dict[str, type[VLM]] = {
    vlm.name: vlm for vlm in (LlavaVideo, LlavaOnevision, MiniCPMV, Qwen25VL, TinyOnevision)
}

__all__ = ["MODELS", "VLM", "Inputs", "LlavaOnevision", "LlavaVideo", "MiniCPMV", "Qwen25VL", "TinyOnevision"]
