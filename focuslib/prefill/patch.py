"""Install a method on a live decoder for the length of a `with` block. The only code that touches a model.

Works on any pre-norm decoder of the Llama/Qwen2 shape: layers with self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj,
input_layernorm and post_attention_layernorm. The stock modules compute everything; the patch replaces the layers'
forward (a drop between attention and MLP needs it), hooks the inputs of o_proj and down_proj, and wraps
the attention function to see the queries.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.kernels.semantic import attention_rows, unseen
from focuslib.prefill.ops import DecoderShape
from focuslib.prefill.record import Events, Prefill, Run

_patches: WeakKeyDictionary[nn.Module, "_Patch"] = WeakKeyDictionary()  # by attention module


def find_decoder(model: nn.Module) -> nn.Module:
    """The language model inside `model`: the module whose `layers` have the Llama/Qwen2 shape."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and all(map(_is_decoder_layer, layers)):
            return module
    raise UserError(
        f"{type(model).__name__} has no decoder of the Llama/Qwen2 shape (self_attn.q_proj, mlp.gate_proj, two norms …)"
    )


def _is_decoder_layer(layer: nn.Module) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    return (
        all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        and all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
        and hasattr(layer, "input_layernorm")
        and hasattr(layer, "post_attention_layernorm")
    )


def decoder_shape(decoder: nn.Module) -> DecoderShape:
    """The dimensions of a decoder, from its config."""
    config = decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderShape(
        layers=len(decoder.layers),
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
    )


@contextmanager
def install(method: Events, vlm, *, trace: bool = False) -> Iterator[Run]:
    """Install `method` on `vlm` and yield its Run; on leaving, also by an exception, the model is as it was.

    vlm: has `model` (a transformers model) and `grid` (the VisualGrid of the inputs it runs next, or None).
    Raises UserError if a method is installed already, or the model has no such decoder.
    """
    decoder = find_decoder(vlm.model)
    patch = _Patch(method, vlm, decoder, Run(method), trace)
    with ExitStack() as undo:
        patch.attach(undo)
        yield patch.run


class _Patch:
    """One installed method: the hooks, and the prefill in progress."""

    def __init__(self, method: Events, vlm, decoder: nn.Module, run: Run, trace: bool):
        self.method = method
        self.vlm = vlm
        self.decoder = decoder
        self.shape = decoder_shape(decoder)
        self.run = run
        self.trace = trace
        self.prefill: Prefill | None = None
        base = decoder.config._attn_implementation
        self.base_attention = ALL_ATTENTION_FUNCTIONS.get_interface(base, _eager_attention(decoder))
        self.base_mask = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def attach(self, undo: ExitStack) -> None:
        """Install every hook, noting how to undo it."""
        attentions = [layer.self_attn for layer in self.decoder.layers]
        active = next((_patches[a] for a in attentions if a in _patches), None)
        if active is not None:
            raise UserError(
                f"{active.method.name} is installed on this model already; leave its block before {self.method.name}"
            )
        for attention in attentions:
            _patches[attention] = self
            undo.callback(_patches.pop, attention, None)
        config = self.decoder.config
        undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
        # a name for each implementation: models of different ones may be patched at the same time
        name = f"focuslib_{config._attn_implementation}"
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, self.base_mask)
        config._attn_implementation_internal = name
        hooks = [
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave),
        ]
        for index, layer in enumerate(self.decoder.layers):
            _replace_forward(layer, _LayerForward(self, index, layer), undo)
            for linear, site in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
                hooks.append(linear.register_forward_pre_hook(_SiteHook(self, index, site)))
        for hook in hooks:
            undo.callback(hook.remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the decoder runs: decide whether this is a prefill, and begin it."""
        self.prefill = None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            embeds = self.decoder.get_input_embeddings()(ids)
        batch, tokens, _ = embeds.shape
        past = kwargs.get("past_key_values")
        seen = past.get_seq_length() if past is not None else 0
        if seen and tokens == 1:
            return
        if batch != 1:
            raise UserError(
                f"{self.method.name}: batch size is {batch}; methods need one sequence at a time (batch size 1)"
            )
        if seen:
            raise UserError(
                f"{self.method.name}: {tokens} tokens after a filled cache; the prompt must be one forward pass"
            )
        grid: VisualGrid | None = self.vlm.grid
        if grid is None or grid.stop > tokens:
            raise UserError(f"{self.method.name}: the prompt has no visual tokens; give a video or an image")
        self.prefill = Prefill(grid, self.shape, tokens, embeds.device, self.trace)
        self.method.begin(self.prefill, embeds[0])

    def _leave(self, module: nn.Module, args: tuple, output) -> None:
        """After the decoder ran: close the prefill."""
        if self.prefill is not None:
            self.method.end(self.prefill)
            self.run.prefills.append(self.prefill.record)
            self.prefill = None

    def site(self, layer: int, site: str, x: Tensor) -> Tensor:
        """Let the method rewrite x [1, T, C] at a linear site."""
        if self.prefill is None:
            return x
        return self.method.at_site(self.prefill, layer, site, x[0])[None]

    def drop(self, event, layer: int, hidden: Tensor) -> Tensor:
        """Let the method rewrite and drop rows of hidden [1, T, D]."""
        if self.prefill is None:
            return hidden
        hidden, rows = event(self.prefill, layer, hidden[0])
        if rows is not None:
            self.prefill.drop(layer, rows)
            hidden = hidden[rows]
        return hidden[None]

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs):
        """The attention function during the block: the events, then the model's own implementation."""
        prefill, layer = self.prefill, module.layer_idx
        if prefill is None:
            return self.base_attention(module, q, k, v, mask, **kwargs)
        scaling = kwargs["scaling"]
        q = self.method.on_attention(prefill, layer, q[0], k[0], scaling)[None]
        if self.method.wants_probabilities(prefill, layer):
            return self._explicit_attention(layer, q[0], k[0], v[0], scaling), None
        return self.base_attention(module, q, k, v, mask, **kwargs)

    def _explicit_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Causal attention with the probabilities offered to the method, one head at a time. → [1, T, H, d]."""
        group = q.shape[0] // k.shape[0]
        rows = torch.arange(q.shape[1], device=q.device)
        future = unseen(rows, q.shape[1])
        out = q.new_empty((1, q.shape[1], q.shape[0], v.shape[2]))
        for head in range(q.shape[0]):
            kv = slice(head // group, head // group + 1)
            probabilities = attention_rows(q[head : head + 1], k[kv], rows, scaling, future)[0]
            probabilities = self.method.on_probabilities(self.prefill, layer, head, probabilities)
            out[0, :, head] = probabilities.to(v.dtype) @ v[kv][0]
        return out


class _LayerForward:
    """The pre-norm decoder layer's forward with the method's events; the same arithmetic as the stock one."""

    def __init__(self, patch: _Patch, index: int, layer: nn.Module):
        self.patch, self.index, self.layer = patch, index, layer

    def __call__(self, hidden_states: Tensor, attention_mask=None, position_ids=None, past_key_values=None,
                 position_embeddings=None, **kwargs) -> Tensor:  # fmt: skip
        patch, layer, index = self.patch, self.layer, self.index
        hidden = patch.drop(patch.method.before_attention, index, hidden_states)
        residual = hidden
        hidden = patch.site(index, "q_proj", layer.input_layernorm(hidden))
        mask, position_ids, position_embeddings = self._present(
            attention_mask, position_ids, position_embeddings, past_key_values, hidden.shape[1]
        )
        hidden, _ = layer.self_attn(
            hidden_states=hidden,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden = patch.drop(patch.method.after_attention, index, residual + hidden)
        if patch.prefill is not None:
            patch.prefill.record.retained.append(len(patch.prefill.present))
        residual = hidden
        hidden = patch.site(index, "gate_proj", layer.post_attention_layernorm(hidden))
        return residual + layer.mlp(hidden)

    def _present(self, mask, position_ids, position_embeddings, past, tokens: int):
        """Mask and positions of the rows still present: the model made them once, for the whole sequence."""
        prefill = self.patch.prefill
        if prefill is None:
            if mask is not None and past is not None:  # a decoding mask is sized by layer 0's cache
                mask = mask[..., -(past.get_seq_length(self.index) + tokens) :]
            return mask, position_ids, position_embeddings
        kept = prefill.kept
        if kept is not None:
            if mask is not None:
                mask = mask[..., kept, :][..., kept]
            position_ids = position_ids[..., kept] if position_ids is not None else None
            position_embeddings = tuple(part[..., kept, :] for part in position_embeddings)
        return mask, position_ids, position_embeddings


class _SiteHook:
    """Forward pre-hook of a linear layer that is a GEMM site."""

    def __init__(self, patch: _Patch, layer: int, site: str):
        self.patch, self.layer, self.site = patch, layer, site

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.patch.site(self.layer, self.site, args[0]), *args[1:])


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    return _patches[module].attention(module, query, key, value, attention_mask, **kwargs)


def _eager_attention(decoder: nn.Module):
    """The eager attention of the decoder's own modelling file (eager is not in the registry)."""
    return sys.modules[type(decoder.layers[0].self_attn).__module__].eager_attention_forward


def _replace_forward(layer: nn.Module, forward, undo: ExitStack) -> None:
    """Replace a layer's forward. A layer dispatched by accelerate keeps its wrapper, which calls `_old_forward`."""
    name = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"
    if name in layer.__dict__:
        undo.callback(setattr, layer, name, layer.__dict__[name])
    else:
        undo.callback(delattr, layer, name)
    setattr(layer, name, forward)
