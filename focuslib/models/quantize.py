"""LLM.int8: the language model's linear layers in 8 bit (Dettmers et al., arXiv 2208.07339), by bitsandbytes."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from focuslib.errors import UserError


def int8_config(keep: tuple[str, ...]) -> BitsAndBytesConfig:
    """The quantization for VLM.load. keep: modules left as they are (they replace the default, the output head)."""
    if find_spec("bitsandbytes") is None:
        raise UserError("8-bit models need bitsandbytes: pip install -c constraints.txt bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each layer that the CPU casts to float16
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))


def linear_layers(decoder: nn.Module) -> dict[str, Any]:
    """What a decoder's linear layers are made of: how many are 8-bit, their weights' dtypes and bytes."""
    weights = [module.weight for module in decoder.layers.modules() if isinstance(module, nn.Linear)]
    return {
        "linear layers": len(weights),
        "in 8 bit": sum(weight.dtype == torch.int8 for weight in weights),
        "weight type": ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
        "weights (MiB)": sum(weight.numel() * weight.element_size() for weight in weights) / 2**20,
    }
