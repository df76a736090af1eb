"""An untrained copy of the embedded model: the architecture without the weights, made in a moment."""

import functools
from pathlib import Path

import numpy as np
import torch

from focuslib.models import TinyOnevision
from training.model import build_model
from training.tokenizer import build_tokenizer


@functools.cache
def tokenizer():
    return build_tokenizer()


def untrained_vlm(attention: str = "sdpa", seed: int = 0) -> TinyOnevision:
    """A TinyOnevision with random weights and the given attention implementation."""
    model = build_model(tokenizer(), seed)
    model.set_attn_implementation(attention)
    return TinyOnevision(model, tokenizer(), TinyOnevision.default_sampling)


def untrained_checkpoint(folder: Path) -> Path:
    """The same, written as a checkpoint folder."""
    build_model(tokenizer(), 0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def clip(frames: int = 4, seed: int = 0) -> np.ndarray:
    """Frames [F, 96, 96, 3] uint8: a still noisy background with a moving block."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 255, (1, 96, 96, 3)), frames, 0) + rng.integers(-6, 6, (frames, 96, 96, 3))
    for frame in range(frames):
        video[frame, 20:44, 8 + 10 * frame : 32 + 10 * frame] = (250, 20, 20)
    return video.clip(0, 255).astype(np.uint8)


def module_state(model: torch.nn.Module) -> dict:
    """Everything a patch could leave behind: attributes, hooks and configuration of every module."""
    state = {}
    for name, module in model.named_modules():
        attributes = {k: id(v) for k, v in module.__dict__.items() if not k.startswith("_")}
        hooks = {k: list(v.items()) for k, v in module.__dict__.items() if k.endswith("hooks")}
        config = getattr(module, "config", None)
        state[name] = (attributes, hooks, getattr(config, "_attn_implementation", None))
    return state
