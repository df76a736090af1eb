"""Find the language model inside a VLM, and say in one line why the patch cannot work on it."""

from collections import defaultdict
from typing import Any

from torch import nn

from focuslib.errors import UserError
from focuslib.prefill.ops import DecoderShape

# What the patch hooks or calls in every layer.
PARTS = (
    "input_layernorm", "post_attention_layernorm",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.config",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def find_decoder(model: nn.Module) -> nn.Module:
    """The language model inside `model`: the innermost module that has `layers` and holds the input embeddings.

    A vision tower or an action expert has layers too, but embeds no text.

    Raises
    ------
    UserError
        If there is none, or its layers lack a part that the patch hooks or calls.
    """
    name, embeddings = type(model).__name__, _input_embeddings(model)
    found: list[Any] = []  # outermost first
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and embeddings in set(module.modules()):
            found.append(module)
    if embeddings is None or not found:
        raise UserError(f"{name} has no decoder of the Llama/Qwen2 shape: nothing with `layers` holds input embeddings")
    for layer in found[-1].layers:
        if lacking := _lacking(layer):
            raise UserError(f"{name} has no decoder of the Llama/Qwen2 shape: {type(layer).__name__} has no {lacking}")
    return found[-1]


def decoder_shape(decoder: Any) -> DecoderShape:
    """The dimensions of a decoder, from its config. Raises UserError if they differ by layer."""
    config = decoder.config
    try:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return DecoderShape(
            layers=len(decoder.layers),
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
        )
    except (AttributeError, RuntimeError) as error:  # transformers' own error for what differs is a RuntimeError
        layer, reason = type(decoder.layers[0]).__name__, str(error).splitlines()[0]
        raise UserError(f"{type(decoder).__name__}: its {layer}s do not share one shape: {reason}") from error


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _lacking(layer: nn.Module) -> str:
    """The parts that a layer lacks, with what it has in their place; empty if none."""
    lacking, instead = [], defaultdict(list)
    for part in PARTS:
        owner, _, name = part.rpartition(".")
        holder = getattr(layer, owner, None) if owner else layer
        if getattr(holder, name, None) is None:
            lacking.append(part)
            instead[owner] = [child for child, _ in holder.named_children()] if isinstance(holder, nn.Module) else []
    has = [f"{type(getattr(layer, owner)).__name__} has {', '.join(names)}" for owner, names in instead.items()
           if owner and names]  # fmt: skip
    return ", ".join(lacking) + (f" ({'; '.join(has)})" if has else "")
