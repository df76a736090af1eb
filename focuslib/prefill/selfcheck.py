"""The patch proves itself on the real model: a layer or an attention that it does not reproduce is refused in one line.

Checked in the first prefill of a block and not before: real inputs, masks and positions are at hand, and the weights
that accelerate keeps elsewhere have arrived.
"""

from collections.abc import Callable
from contextvars import Context
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from focuslib.errors import UserError
from focuslib.kernels.semantic import attention_rows
from focuslib.prefill.masks import MASKED, full_mask

TOKENS = 8  # enough to tell two forwards apart, and nearly free
CALLED = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
Arguments = dict[str, Any]


def layer_kind(layer: nn.Module, own: Callable) -> tuple:
    """What two layers share if they compute alike: their forward, and every module's class and plain attributes."""
    parts = [
        (name, type(module), tuple(sorted(
            (key, value) for key, value in vars(module).items()
            if key != "layer_idx" and isinstance(value, (bool, int, float, str))
        )))
        for name, module in layer.named_modules()
    ]  # fmt: skip
    # what a layer has beside the pre-norm modules may matter in one layer and be neutral in the next
    return (getattr(own, "__func__", own), *parts, id(layer) if _extras(layer) else None)


def check_layer(model: str, layer: nn.Module, own: Callable, ours: Callable, hidden: Tensor, arguments: Arguments):
    """Run a layer's own forward and ours on the first tokens, without a cache.

    Parameters
    ----------
    model
        Name of the model, for the message.
    own, ours
        Both take hidden [1, T, D] and keyword arguments.
    hidden, arguments
        What the model gives the layer.

    Raises
    ------
    UserError
        If the two differ in a single bit, or one of them fails.
    """
    name = f"{model}: {type(layer).__name__}"
    hidden = hidden[:, :TOKENS]
    arguments = {key: first_tokens(key, value) for key, value in arguments.items()}
    # an empty context: transformers' recording of attentions and hidden states does not see these calls
    expected, reason = Context().run(_run, own, hidden, arguments)
    if reason:
        raise UserError(f"{name} cannot be compared with the forward this patch reproduces: {reason}")
    got, reason = Context().run(_run, ours, hidden, arguments)
    if reason:
        raise UserError(f"{name} is not the pre-norm layer this patch reproduces{_extras(layer)}: {reason}")
    if not isinstance(expected, Tensor):
        raise UserError(f"{name} returns a {type(expected).__name__}; the forward this patch reproduces, one tensor")
    if not torch.allclose(got, expected, rtol=0, atol=0, equal_nan=True):
        difference = (got.float() - expected.float()).abs().max()
        raise UserError(
            f"{name}: its forward is not the pre-norm one this patch reproduces "
            f"(max difference {difference:.3g}){_extras(layer)}"
        )


def check_rows(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, base: Callable,
               implementation: str, arguments: Arguments) -> None:  # fmt: skip
    """Whether a layer's attention is softmax(scaling · q · k + mask), as whoever recomputes rows of it assumes.

    Parameters
    ----------
    module, q, k, v, mask, arguments
        What the layer gives its attention function: q [1, H, T, d], k and v [1, H_kv, T, d], mask [1, 1 or H, T, T];
        in a decoding step one query, and its row of the mask.
    base, implementation
        That function, and its name.

    Raises
    ------
    UserError
        If it is more than that: a soft cap, sinks, a bias; or a mask that is out of reach.
    """
    name = type(module).__name__
    extras = {
        "a soft cap": arguments.get("softcap") or getattr(module, "attn_logit_softcapping", None),
        "attention sinks": arguments.get("s_aux"),
        "a position bias": arguments.get("position_bias"),
    }
    for what, value in extras.items():
        if value is not None:
            raise UserError(f"{name} attends with {what}; the attention rows a method asks for would be wrong")
    window = arguments.get("sliding_window")
    if implementation not in MASKED and (mask is not None or (window is not None and k.shape[2] > window)):
        raise UserError(
            f"{name}: {implementation} attention keeps its mask to itself; a method that needs attention rows of it "
            "takes attn_implementation='sdpa' or 'eager'"
        )
    q, k, v = q[:, :, -TOKENS:], k[:, :, -TOKENS:], v[:, :, -TOKENS:]
    mask, step = None if mask is None else mask[..., -TOKENS:, -TOKENS:], q.shape[2] < k.shape[2]
    expected = base(module, q, k, v, mask, **arguments)[0][0].transpose(0, 1)  # [H, T, d]
    if not step:
        mask = full_mask(module, q, mask, implementation, arguments)
    first = k.shape[2] - q.shape[2] if mask is None else 0
    rows = torch.arange(first, first + q.shape[2], device=q.device)
    scaling = arguments.get("scaling") or q.shape[-1] ** -0.5
    weights = attention_rows(q[0], k[0], rows, scaling, None if mask is None else mask[0])
    got = weights.to(v.dtype) @ v[0].repeat_interleave(q.shape[1] // v.shape[1], 0)
    if mask is not None and not step:  # a row of padding sees nothing, and is nothing
        itself = mask[0, 0].diagonal()
        real = itself if itself.dtype == torch.bool else itself >= 0
        got, expected = got[:, real], expected[:, real]
    allowed = 1e-4 if v.dtype == torch.float32 else 5e-2
    difference = (got.float() - expected.float()).abs().max() if got.numel() else 0.0
    if difference > allowed * v.abs().max():
        raise UserError(
            f"{name}: its attention is not the softmax of scaled products under its mask (max difference "
            f"{difference:.3g}); the attention rows a method asks for would be wrong"
        )


def first_tokens(name: str, value: Any) -> Any:
    """A layer's argument for the first tokens only."""
    if name == "attention_mask" and isinstance(value, Tensor):
        return value[:, :TOKENS] if value.dim() == 2 else value[..., :TOKENS, :TOKENS]
    if name == "position_ids" and isinstance(value, Tensor):
        return value[..., :TOKENS]
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(part[..., :TOKENS, :] for part in value)
    return None if isinstance(value, Cache) else value


@torch.no_grad()
def _run(forward: Callable, hidden: Tensor, arguments: Arguments) -> tuple[Any, str]:
    """What a forward returns, or why it does not; the random numbers that it may draw are not missed afterwards."""
    try:
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            return forward(hidden.clone(), **arguments), ""
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign layer may raise
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _extras(layer: nn.Module) -> str:
    """What a layer has beside the modules that the pre-norm forward calls: the likely reason of a difference."""
    modules = [name for name, _ in layer.named_children() if name not in CALLED]
    parameters = [name for name, _ in layer.named_parameters(recurse=False)]
    scalars = [f"{name} = {value:g}" for name, value in vars(layer).items() if isinstance(value, float)]
    extras = modules + parameters + scalars
    return f"; it also has {', '.join(extras)}" if extras else ""
