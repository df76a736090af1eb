"""Install a method on a live decoder for the length of a `with` block. The only code that touches a model.

Works on any pre-norm decoder of the Llama/Qwen2 shape: layers with self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj,
input_layernorm and post_attention_layernorm. The stock modules compute everything; the patch replaces the layers'
forward (a drop between attention and MLP needs it), hooks the inputs of o_proj and down_proj, and wraps
the attention function to see the queries. In the first prefill each kind of layer proves that its own forward is the
one that replaces it (see selfcheck).
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from focuslib.errors import UserError
from focuslib.kernels.semantic import attention_rows, causal_attention
from focuslib.prefill.between import Between
from focuslib.prefill.cache import follow
from focuslib.prefill.decoder import decoder_shape, find_decoder
from focuslib.prefill.decoding import Decoding
from focuslib.prefill.handover import grid_of
from focuslib.prefill.masks import full_mask, kept_deepstack, kept_mask, padding_of, require_mask
from focuslib.prefill.positions import has_axes, shifted
from focuslib.prefill.record import Events, Prefill, Run
from focuslib.prefill.selfcheck import check_layer, check_rows, layer_kind
from focuslib.prefill.tower import Tower, watch

_SMALL = 1 << 20  # entries of attention matrices that are formed at a time

_patches: WeakKeyDictionary[nn.Module, "_Patch"] = WeakKeyDictionary()  # by attention module


@contextmanager
def install(method: Events, vlm, *, trace: bool = False) -> Iterator[Run]:
    """Install `method` on `vlm` and yield its Run; on leaving, also by an exception, the model is as it was.

    vlm: has `model`, a transformers model. The grid of each prompt comes with its inputs (see handover).
    Raises UserError if a method is installed already, or the model has no such decoder.
    """
    decoder = find_decoder(vlm.model)
    patch = _Patch(method, vlm, decoder, Run(method), trace)
    with ExitStack() as undo:
        patch.attach(undo)
        yield patch.run


class _Patch:
    """One installed method: the hooks, and the prefill or decoding step in progress.

    kinds: the kinds of layers that passed the self-check. rows: the layers whose attention rows did.
    reached: whether the attention function was called since this was last set to False.
    decoding: in a step over a cache that a patched prefill filled; else None.
    """

    def __init__(self, method: Events, vlm, decoder: Any, run: Run, trace: bool):
        self.method = method
        self.vlm = vlm
        self.decoder = decoder
        self.shape = decoder_shape(decoder)
        self.run = run
        self.trace = trace
        self.prefill: Prefill | None = None
        self.decoding: Decoding | None = None
        self.kinds: set[tuple] = set()
        self.rows: set[int] = set()
        self.reached = False
        self.labels = False
        self.between = Between(decoder)
        self.tower: Tower | None = None
        self.looking = False  # whether a layer's queries and keys are wanted, and nothing else of it
        self.implementation: str = decoder.config._attn_implementation
        if self.implementation == "flex_attention":
            raise UserError(f"{method.name}: flex_attention hides its masks; load with attn_implementation='sdpa'")
        self.base_attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, _eager_attention(decoder))
        self.base_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(self.implementation)
        self.configs: list[tuple[nn.Module, Any]] = []  # module, its own config

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
        self._route_attention(attentions, undo)
        if self.method.watched_layer is not None:
            self.tower = watch(self.vlm.model, self.decoder, self.method.watched_layer, undo)
        hooks = [
            self.vlm.model.register_forward_pre_hook(self._asked, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave),
        ]
        for index, layer in enumerate(self.decoder.layers):
            _replace_forward(layer, partial(_LayerForward, self, index, layer), undo)
            for linear, site in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
                hooks.append(linear.register_forward_pre_hook(_SiteHook(self, index, site)))
        for hook in hooks:
            undo.callback(hook.remove)
        _replace_forward(self.decoder, lambda own: self.between.guarded(own, lambda: self.prefill), undo)
        if hasattr(self.decoder, "_deepstack_process"):  # Qwen3-VL adds visual features after the first layers
            own = self.decoder._deepstack_process
            undo.callback(delattr, self.decoder, "_deepstack_process")
            self.decoder._deepstack_process = partial(self._deepstack, own)

    def _route_attention(self, attentions: list[Any], undo: ExitStack) -> None:
        """Send the decoder's attention through the patch: its modules get copies of their configs that say so.

        Copies, because another model may have been built from the same config object.
        """
        # a name for each implementation: models of different ones may be patched at the same time
        name = f"focuslib_{self.implementation}"
        AttentionInterface.register(name, _attention)
        if self.base_mask is not None:
            AttentionMaskInterface.register(name, self.base_mask)
        copies = {}
        for config in (self.decoder.config, *(attention.config for attention in attentions)):
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                copies[id(config)]._attn_implementation_internal = name
        # not the attention that a decoder may have beside its layers (Idefics), which is none of a method's
        for module in (self.decoder, *self.decoder.layers.modules()):
            config = vars(module).get("config")
            if id(config) in copies:
                self.configs.append((module, config))
                undo.callback(setattr, module, "config", config)
                module.config = copies[id(config)]

    @contextmanager
    def untouched(self, layer: nn.Module) -> Iterator[None]:
        """A layer with its own configs for a while: it computes as if nothing were installed, but for its forward."""
        inside = set(layer.modules())
        with ExitStack() as undo:
            for module, config in self.configs:
                if module in inside:
                    undo.callback(setattr, module, "config", module.config)
                    module.config = config
            yield

    def _asked(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the model runs: whether it is to compare its logits with labels, one a token of the whole prompt."""
        self.labels = kwargs.get("labels") is not None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the decoder runs: decide whether this is a prefill, and begin it."""
        self.prefill = self.decoding = None
        self.between.begin()
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            embeds = self.decoder.get_input_embeddings()(ids)
        batch, tokens, _ = embeds.shape
        past = kwargs.get("past_key_values")
        if any(isinstance(layer, StaticLayer) for layer in getattr(past, "layers", ())):
            raise UserError(
                f"{self.method.name}: a static cache keeps a slot for every token and so cannot drop any; "
                "generate without cache_implementation='static'"
            )
        seen = past.get_seq_length() if past is not None else 0
        if past is not None and seen and tokens == 1:
            self._step(past, seen)
            return
        if batch != 1:
            raise UserError(
                f"method {self.method.name}: batch size is {batch}; methods need one sequence at a time (batch size 1)"
            )
        if seen:
            raise UserError(
                f"method {self.method.name}: {tokens} tokens after a filled cache; the prompt must be one forward "
                "pass, and an answer is decoded token by token"
            )
        grid = grid_of(self.vlm)
        if grid is None:
            raise UserError(f"method {self.method.name}: the prompt has no visual tokens; give a video or an image")
        if grid.stop > tokens:
            raise UserError(
                f"method {self.method.name}: {tokens} tokens, but the prompt's visual ones end at {grid.stop}; the "
                "prompt must be one forward pass (no prefill_chunk_size), its grid that of its own inputs"
            )
        self.prefill = Prefill(grid, self.shape, tokens, embeds.device, self.trace)
        if has_axes(self.decoder):
            self.prefill.renumbering = None
        if self.tower is not None:
            self.tower.done, self.prefill.watched = True, self.tower
        self.method.begin(self.prefill, embeds[0])

    def _step(self, past: Cache, seen: int) -> None:
        """Before a decoding step: find what the prefill left of its cache. seen: tokens so far, dropped ones too."""
        decoding = self.decoding = getattr(past, "focuslib_decoding", None)
        if decoding is not None:
            decoding.origins.now = seen
            decoding.record.decoded += decoding.method is self.method

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
        return self.method.at_site(self.prefill, layer, site, _own(x[0]))[None]

    def drop(self, event, layer: int, hidden: Tensor) -> Tensor:
        """Let the method rewrite and drop rows of hidden [1, T, D]."""
        if self.prefill is None:
            return hidden
        hidden, rows = event(self.prefill, layer, _own(hidden[0]))
        if rows is not None:
            if self.labels:
                raise UserError(
                    f"{self.method.name}: labels are for every token of the prompt, of which this method drops some; "
                    "run the model without labels, and take the loss of the logits that are left"
                )
            self.prefill.drop(layer, rows)
            hidden = hidden[rows]
        return hidden[None]

    def attention(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs):
        """The attention function during the block: the events, then the model's own implementation."""
        prefill, layer, window = self.prefill, module.layer_idx, kwargs.get("sliding_window")
        self.reached = True
        if prefill is None:
            if self.decoding is not None:
                k, v, mask = self._step_entries(self.decoding, module, q, k, v, mask, kwargs)
            return self.base_attention(module, q, k, v, mask, **kwargs)
        if prefill.kept is not None and window is not None and prefill.origins.length > window:
            require_mask(self.implementation)
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        prefill.running_mask = partial(self._rows_mask, module, q, k, v, mask, kwargs)
        if self.looking:
            raise _Seen(q[0], k[0], scaling)
        q = self.method.on_attention(prefill, layer, q[0], k[0], scaling)[None]
        if self.method.wants_probabilities(prefill, layer):
            return self._explicit_attention(prefill, layer, q[0], k[0], v[0], scaling), None
        return self.base_attention(module, q, k, v, mask, **kwargs)

    def _step_entries(self, decoding: Decoding, module: Any, q: Tensor, k: Tensor, v: Tensor, mask, kwargs: dict):
        """In a decoding step: the keys and values [1, H_kv, R, d] that a layer sees, and the mask over them."""
        layer, window, entries = module.layer_idx, kwargs.get("sliding_window"), k.shape[2]
        if decoding.origins.dropped:
            mask = decoding.origins.step_mask(layer, q, entries, window, self.implementation)
        if decoding.method is not self.method:
            return k, v, mask
        decoding.layer, decoding.keys = layer, entries
        decoding.row = partial(self._step_row, module, q, k, v, mask, kwargs)
        rows = self.method.on_decoding(decoding, layer)
        if rows is None:
            return k, v, mask
        if len(q) > 1:
            raise UserError(f"method {self.method.name}: {len(q)} sequences after one prompt; decode one at a time")
        if window is not None and decoding.origins.now >= window:
            require_mask(self.implementation)
        decoding.record.hidden += entries - len(rows)
        return k[:, :, rows], v[:, :, rows], None if mask is None else mask[..., rows]

    def _step_row(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor:
        """A decoding step's row of attention, [H, K] float32."""
        self._require_rows(module, q, k, v, mask, kwargs)
        row = torch.tensor([k.shape[2] - 1 if mask is None else 0], device=q.device)  # a mask is of this row alone
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        return attention_rows(q[0], k[0], row, scaling, None if mask is None else mask[0])[:, 0]

    def _require_rows(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict) -> None:
        """Raise UserError if rows of a layer's attention that are computed beside the model would be wrong."""
        if module.layer_idx not in self.rows:
            check_rows(module, q, k, v, mask, self.base_attention, self.implementation, kwargs)
            self.rows.add(module.layer_idx)

    def _deepstack(self, own: Callable, hidden: Tensor, masks: Tensor, embeds: Tensor) -> Tensor:
        """The decoder's own addition of visual features, to the tokens that are left."""
        if self.prefill is not None and self.prefill.kept is not None:
            masks, embeds = kept_deepstack(masks, embeds, self.prefill.kept)
        hidden = own(hidden, masks, embeds)
        if self.prefill is not None:
            self.between.follow(len(self.prefill.record.retained), hidden)
        return hidden

    def _rows_mask(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict):
        """The mask for attention rows that are computed beside the model, [1 or H, T, T]; None: causal."""
        self._require_rows(module, q, k, v, mask, kwargs)
        mask = full_mask(module, q, mask, self.implementation, kwargs)
        return None if mask is None else mask[0]

    def _explicit_attention(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> Tensor:
        """Attention with the probabilities offered to the method, one head at a time. → [1, T, H, d]."""
        (heads, tokens, _), group, mask = q.shape, q.shape[0] // k.shape[0], prefill.mask
        rows = torch.arange(tokens, device=q.device)
        out = q.new_empty((1, tokens, heads, v.shape[2]))
        together = heads if heads * tokens**2 <= _SMALL else 1
        memory: Tensor | None = None
        for first in range(0, heads, together):
            some, kv = slice(first, first + together), slice(first // group, (first + together - 1) // group + 1)
            if mask is None:
                matrices = causal_attention(q[some], k[kv], scaling, memory)
                memory = None if matrices.requires_grad else matrices
            else:
                matrices = attention_rows(q[some], k[kv], rows, scaling, mask if len(mask) == 1 else mask[some])
            for head, matrix in enumerate(matrices, first):
                probabilities = self.method.on_probabilities(prefill, layer, head, _own(matrix))
                out[0, :, head] = probabilities.to(v.dtype) @ v[head // group]
        return out


class _Seen(Exception):
    """A layer's queries [H, T, d], keys [H_kv, T, d] and scaling: ends a look ahead."""

    def __init__(self, queries: Tensor, keys: Tensor, scaling: float):
        self.queries, self.keys, self.scaling = queries, keys, scaling


class _LayerForward:
    """The pre-norm decoder layer's forward with the method's events; the same arithmetic as the stock one.

    own: the layer's own forward, which the first prefill compares with this one.
    """

    def __init__(self, patch: _Patch, index: int, layer: Any, own: Callable):
        self.patch, self.index, self.layer, self.own = patch, index, layer, own
        self.names = [name for name in inspect.signature(own).parameters if name != "hidden_states"]
        self.checked = False

    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        kwargs.update(zip(self.names, args, strict=False))
        patch = self.patch
        with patch.between.layer(self.index, hidden_states, patch.prefill):
            if patch.prefill is not None and not self.checked:
                self._check(patch.prefill, hidden_states, kwargs)
                self.checked = True
            hidden = self._forward(hidden_states, **kwargs)
        if patch.prefill is not None:
            patch.between.follow(self.index + 1, hidden)
        return hidden

    def _forward(self, hidden_states: Tensor, attention_mask=None, position_ids=None, past_key_values=None,
                 position_embeddings=None, **kwargs) -> Tensor:  # fmt: skip
        patch, layer, index = self.patch, self.layer, self.index
        if patch.prefill is not None:
            patch.prefill.coming = partial(self._ahead, attention_mask, position_ids, position_embeddings, kwargs)
        hidden = patch.drop(patch.method.before_attention, index, hidden_states)
        if patch.prefill is not None:
            patch.prefill.coming = None
            patch.prefill.record.attended.append(len(patch.prefill.present))
        residual = hidden
        hidden = patch.site(index, "q_proj", layer.input_layernorm(hidden))
        self._note(attention_mask, past_key_values)
        mask, position_ids, position_embeddings = self._present(
            attention_mask, position_ids, position_embeddings, kwargs
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

    def _ahead(self, mask, position_ids, position_embeddings, others: dict, hidden: Tensor):
        """The queries, keys and scaling of this layer's attention, were `hidden` [T, D] its input."""
        patch, layer = self.patch, self.layer
        mask, position_ids, position_embeddings = self._present(mask, position_ids, position_embeddings, others)
        patch.looking = True
        try:
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden[None]),
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=None,
                position_embeddings=position_embeddings,
                **others,
            )
        except _Seen as seen:
            return seen.queries, seen.keys, seen.scaling
        finally:
            patch.looking = False
        raise UserError(f"{type(layer.self_attn).__name__} does not call one of transformers' attention functions")

    def _check(self, prefill: Prefill, hidden: Tensor, arguments: dict) -> None:
        """Refuse a layer of a new kind whose own forward is another one. The method takes no part in this."""
        patch, layer = self.patch, self.layer
        kind = layer_kind(layer, self.own)
        if kind in patch.kinds:
            return
        patch.prefill = None
        kept = prefill.kept
        if kept is not None:
            arguments = {name: _kept_rows(name, value, kept) for name, value in arguments.items()}

        def own(*args, **kwargs):
            with patch.untouched(layer):
                return self.own(*args, **kwargs)

        patch.reached = False
        name = type(patch.vlm.model).__name__
        check_layer(name, layer, own, self._forward, hidden, arguments)
        if not patch.reached:
            raise UserError(
                f"{name}: {type(layer).__name__}: its {type(layer.self_attn).__name__} does not call one of "
                "transformers' attention functions, so a method would see no queries"
            )
        patch.prefill = prefill
        patch.kinds.add(kind)

    def _note(self, mask: Tensor | None, past: Any) -> None:
        """Note which tokens of the prompt enter this layer's cache: later decoding steps need to know."""
        prefill = self.patch.prefill
        if prefill is None or past is None:
            return
        if self.index == 0:
            prefill.origins.padding = padding_of(mask)
            follow(past, Decoding(self.patch.method, prefill))
        prefill.origins.kept.append(prefill.kept)
        prefill.origins.shifts.append(prefill.shift)

    def _present(self, mask, position_ids, position_embeddings, others: dict):
        """Mask and positions of the rows still present: the model made them once, for the whole sequence."""
        prefill, decoding = self.patch.prefill, self.patch.decoding
        if prefill is None and decoding is not None and (shift := decoding.origins.shifts[self.index]):
            embeddings = shifted(self.patch.decoder, self.index, shift, position_ids, position_embeddings)
            return mask, position_ids - shift, embeddings
        if prefill is None or prefill.kept is None:
            return mask, position_ids, position_embeddings
        for name, value in others.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, prefill.origins.length):
                raise UserError(
                    f"{type(self.layer).__name__} is given `{name}` for every token, which this patch does not drop"
                )
        named = {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": position_embeddings}
        positions = prefill.kept if prefill.positions is None else prefill.positions
        rows = {"attention_mask": prefill.kept, "position_ids": positions, "position_embeddings": positions}
        return tuple(_kept_rows(name, value, rows[name]) for name, value in named.items())


class _SiteHook:
    """Forward pre-hook of a linear layer that is a GEMM site."""

    def __init__(self, patch: _Patch, layer: int, site: str):
        self.patch, self.layer, self.site = patch, layer, site

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.patch.site(self.layer, self.site, args[0]), *args[1:])


def _own(x: Tensor) -> Tensor:
    """What a method may overwrite: autograd may need what x was computed from."""
    return x.clone() if x.requires_grad else x


def _kept_rows(name: str, value, kept: Tensor):
    """A layer's argument for the tokens that are kept."""
    if name == "attention_mask":
        return kept_mask(value, kept)
    if name == "position_ids" and value is not None:
        return value[..., kept]
    if name == "position_embeddings" and value is not None:
        return tuple(part[..., kept, :] for part in value)
    return value


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    return _patches[module].attention(module, query, key, value, attention_mask, **kwargs)


def _eager_attention(decoder: Any) -> Any:
    """The eager attention of the decoder's own modelling file (eager is not in the registry); None if it has none."""
    files = (sys.modules[cls.__module__] for cls in type(decoder.layers[0].self_attn).__mro__)
    return next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)


def _replace_forward(layer: nn.Module, make: Callable[[Callable], Callable], undo: ExitStack) -> None:
    """Replace a layer's forward by what `make` makes of it.

    A layer dispatched by accelerate keeps its wrapper, which calls `_old_forward`.
    """
    name = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"
    forward = make(getattr(layer, name))
    if name in layer.__dict__:
        undo.callback(setattr, layer, name, layer.__dict__[name])
    else:
        undo.callback(delattr, layer, name)
    setattr(layer, name, forward)
