"""LLM.int8: linear layers in 8 bit (Dettmers et al., arXiv 2208.07339), by bitsandbytes."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from focuslib.errors import needs_extra
from focuslib.prefill.decoder import find_decoder


def int8_config(keep: tuple[str, ...]) -> BitsAndBytesConfig:
    """The quantization for VLM.load. keep: modules left as they are (they replace the default, the output head)."""
    if find_spec("bitsandbytes") is None:
        raise needs_extra("an 8-bit model", "int8")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each layer that the CPU casts to float16
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))


def linear_layers(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What the linear layers of each part of a VLM are made of: how many, how many in 8 bit, their types and MiB."""
    decoder, parts = find_decoder(model), {}
    in_decoder, head = set(decoder.modules()), model.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        outer = name.removeprefix("model.").split(".")[0]
        part = "language model" if module in in_decoder else "output head" if module is head else outer
        parts.setdefault(part, []).append(module.weight)
    return {
        part: {
            "linear layers": len(weights),
            "in 8 bit": sum(weight.dtype == torch.int8 for weight in weights),
            "weight type": ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
            "weights (MiB)": sum(weight.numel() * weight.element_size() for weight in weights) / 2**20,
        }
        for part, weights in parts.items()
    }
