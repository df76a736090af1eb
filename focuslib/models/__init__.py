"""Vision-language models: media and a prompt become inputs and their visual grid, and stock networks run them."""

from focuslib.models.base import VLM, Inputs
from focuslib.models.hf import HfVLM
from focuslib.models.llava_onevision import LlavaOnevision
from focuslib.models.llava_video import LlavaVideo
from focuslib.models.minicpmv import MiniCPMV
from focuslib.models.qwen2_5_vl import Qwen25VL
from focuslib.models.registry import MODELS, load, load_vlm
from focuslib.models.tiny import TinyOnevision

__all__ = [
    "MODELS",
    "VLM",
    "HfVLM",
    "Inputs",
    "LlavaOnevision",
    "LlavaVideo",
    "MiniCPMV",
    "Qwen25VL",
    "TinyOnevision",
    "load",
    "load_vlm",
]
