"""The methods, by name. A new method is one file here and one entry below."""

from focuslib.methods.adaptiv import Adaptiv
from focuslib.methods.base import Dense, Method, Stack
from focuslib.methods.cmc import Cmc
from focuslib.methods.controls import Random, Uniform
from focuslib.methods.dycoke import DyCoke
from focuslib.methods.evs import Evs
from focuslib.methods.fastv import FastV
from focuslib.methods.fewer import FewerFrames, FewerPixels
from focuslib.methods.flashvid import FlashVid
from focuslib.methods.focus import Focus
from focuslib.methods.framefusion import FrameFusion
from focuslib.methods.pyramiddrop import PyramidDrop
from focuslib.methods.vidcom2 import VidCom2
from focuslib.methods.visionzip import VisionZip
from focuslib.prefill.record import Prefill, PrefillRecord

_CLASSES = (
    Dense, Focus, FrameFusion, Adaptiv, Cmc, FastV, Evs, VidCom2, PyramidDrop, DyCoke, VisionZip, FlashVid,
    Random, Uniform, FewerFrames, FewerPixels,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in _CLASSES}

__all__ = [
    "METHODS", "Adaptiv", "Cmc", "Dense", "DyCoke", "Evs", "FastV", "FewerFrames", "FewerPixels", "FlashVid", "Focus",
    "FrameFusion", "Method", "Prefill", "PrefillRecord", "PyramidDrop", "Random", "Stack", "Uniform", "VidCom2",
    "VisionZip",
]  # fmt: skip
