"""Positions after rows were renumbered: what a token that is decoded later stands at, layer by layer."""

import inspect
from typing import Any

import torch
from torch import Tensor

from focuslib.errors import UserError


def has_axes(decoder: Any) -> bool:
    """Whether a decoder's positions have several axes (M-RoPE: time, height, width)."""
    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return "mrope_section" in rope


def shifted(decoder: Any, layer: int, shift: int, position_ids: Tensor, embeddings: tuple) -> tuple[Tensor, ...]:
    """The rotary embeddings of tokens that stand `shift` positions earlier than the model counts.

    position_ids: [1, N]. embeddings: the model's own for them, (cos, sin). Raises UserError where the decoder's rotary
    module does not give those.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    arguments = {}
    if rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters:
        arguments["layer_type"] = decoder.config.layer_types[layer]
    own = () if rotary is None else rotary(embeddings[0], position_ids, **arguments)
    if rotary is None or len(own) != len(embeddings) or not all(map(torch.equal, own, embeddings)):
        raise UserError(
            f"{type(decoder).__name__}: positions cannot be renumbered: its rotary embedding is made elsewhere"
        )
    return rotary(embeddings[0], position_ids - shift, **arguments)
