"""What the vision tower attends to: its attention and keys of one layer, pooled to the language model's tokens."""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from focuslib.errors import UserError

_watched: WeakKeyDictionary[nn.Module, "Tower"] = WeakKeyDictionary()  # by attention module
Seen = tuple[tuple["Picture", ...], Tensor | None]  # pictures, and their order
Shapes = Sequence[tuple[int, int]]  # rows and columns of tokens of each picture (frame) that the language model sees


@dataclass
class Picture:
    """One picture (frame), or one window of it: the attention that each patch receives [N] float32, and keys [N, d].

    received: mean over heads, of the CLS token's row where there is one (which then is no patch), else over all rows.
    keys: mean over heads.
    """

    received: Tensor
    keys: Tensor


@dataclass
class Tower:
    """Watches one layer of a vision tower; what it saw is kept until the tower runs again after a prefill.

    layer: which one. blocks: whether the patches of one token stand together, as in towers that merge them themselves.
    order: where it reorders its tokens into windows, the place of each; else None.
    """

    layer: int
    blocks: bool
    base: Any = None  # the layer's own attention function
    pictures: list[Picture] = field(default_factory=list)
    order: Tensor | None = None
    done: bool = False

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs):
        """The attention function of that layer: q, k [B, H, N, d]."""
        self._forget()
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        for index in range(len(q)):
            added = None if mask is None else mask[index]
            self.pictures.append(see(q[index], k[index], scaling, added, cls=not self.blocks))
        return self.base(module, q, k, v, mask, **kwargs)

    def reorder(self, own: Any, x: Tensor, window_index: Tensor, *args, **kwargs):
        """The tower's own reordering into windows, whose order is noted."""
        self.order = window_index
        return own(x, window_index, *args, **kwargs)

    def watching(self, run: Callable[[], Tensor]) -> tuple[Tensor, Seen]:
        """What running the tower gives, and what was seen of it, to be shown again instead of running it."""
        self._forget()
        before = len(self.pictures)
        result = run()
        return result, (tuple(self.pictures[before:]), self.order)

    def show(self, seen: Seen) -> None:
        """As if the tower had run now, and this was seen."""
        self._forget()
        pictures, self.order = seen
        self.pictures.extend(pictures)

    def _forget(self) -> None:
        """What belongs to a prompt before goes when the tower runs again."""
        if self.done:
            self.pictures, self.done = [], False

    def pooled(self, shapes: Shapes) -> Picture:
        """The attention [S] and keys [S, d] of the tokens of all pictures, one after another.

        Raises UserError where the tower did not run inside the method's block, or its pictures are not those frames.
        """
        if not self.pictures:
            raise UserError("the vision tower was not seen at work: prepare the prompt inside the method's block")
        if self.blocks:
            tokens = sum(rows * columns for rows, columns in shapes)
            patches = sum(len(picture.received) for picture in self.pictures)
            return merged(self.pictures, max(1, patches // tokens), self.order, tokens)
        if len(self.pictures) != len(shapes):
            raise UserError(
                f"the vision tower saw {len(self.pictures)} pictures and the prompt has {len(shapes)} frames of "
                "tokens; a method that reads the tower needs one picture a frame"
            )
        parts = [resized(picture, shape) for picture, shape in zip(self.pictures, shapes, strict=True)]
        return Picture(torch.cat([part.received for part in parts]), torch.cat([part.keys for part in parts]))


def see(q: Tensor, k: Tensor, scaling: float, mask: Tensor | None, cls: bool) -> Picture:
    """One picture's attention: q, k [H, N, d]; mask [1 or H, N, N] to add or of what is seen. cls: it may have CLS."""
    received, alone = torch.zeros(k.shape[1], device=k.device), cls and has_cls(k.shape[1])
    for head in range(len(q)):
        scores = (q[head, :1] if alone else q[head]) @ k[head].T * scaling
        if mask is not None:
            own = mask[min(head, len(mask) - 1)][: len(scores)]
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
        received += scores.float().softmax(-1).mean(0) / len(q)
    return Picture(received[int(alone) :], k.float().mean(0)[int(alone) :])


def has_cls(patches: int) -> bool:
    """Whether so many are a square and one more: a tower's patches with its CLS token."""
    return math.isqrt(patches) ** 2 != patches and math.isqrt(patches - 1) ** 2 == patches - 1


def resized(picture: Picture, shape: tuple[int, int]) -> Picture:
    """A picture as rows × columns of tokens, bilinearly: where that is a half, the mean of 2 × 2 patches.

    Its patches, row by row, are some n × n for each token, or a square.
    """
    patches = len(picture.received)
    side = math.isqrt(patches // math.prod(shape))
    sides = (shape[0] * side, shape[1] * side)
    if math.prod(sides) != patches:
        sides = (math.isqrt(patches), math.isqrt(patches))
    if math.prod(sides) != patches:
        raise UserError(
            f"the vision tower's {patches} patches are no square, nor {shape[0]} × {shape[1]} tokens of some patches; "
            "its attention cannot be pooled"
        )
    maps = torch.cat([picture.received[:, None], picture.keys], 1).T.view(1, -1, *sides)
    if shape != sides:
        maps = F.interpolate(maps, shape, mode="bilinear")
    flat = maps[0].flatten(1).T
    return Picture(flat[:, 0], flat[:, 1:])


def merged(pictures: list[Picture], patches: int, order: Tensor | None, tokens: int) -> Picture:
    """Means of every `patches` patches in turn, in the order of the tokens."""
    received = torch.cat([picture.received for picture in pictures])
    keys = torch.cat([picture.keys for picture in pictures])
    if len(received) != tokens * patches:
        raise UserError(
            f"the vision tower's {len(received)} patches are not {patches} for each of {tokens} visual tokens"
        )
    received, keys = received.view(tokens, patches).mean(1), keys.view(tokens, patches, -1).mean(1)
    if order is not None:
        back = order.argsort()
        received, keys = received[back], keys[back]
    return Picture(received, keys)


def watch(model: nn.Module, decoder: nn.Module, layer: int, undo: ExitStack) -> Tower:
    """Watch a layer of the model's vision tower. Raises UserError if it has no tower of the usual shape, or layer."""
    name, owner, layers = find_tower(model, decoder)
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"{name}: layer {layer} does not exist; it has {len(layers)}")
    attention = _attention_of(layers[layer])
    if attention is None:
        raise UserError(f"{name}: {type(layers[layer]).__name__} calls none of transformers' attention functions")
    tower = Tower(layer, blocks=hasattr(owner, "spatial_merge_size") or _unshuffles(model, owner))
    implementation = attention.config._attn_implementation
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    tower.base = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if implementation == "flash_attention_2" and tower.blocks:
        raise UserError(f"{name}: flash attention packs the pictures; load with attn_implementation='sdpa'")
    AttentionInterface.register("focuslib_tower", _attention)
    _watched[attention] = tower
    undo.callback(_watched.pop, attention, None)
    undo.callback(setattr, attention, "config", attention.config)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = "focuslib_tower"
    if hasattr(owner, "permute_input_for_window_attn"):  # Qwen2.5-VL
        own = owner.permute_input_for_window_attn
        undo.callback(delattr, owner, "permute_input_for_window_attn")
        owner.permute_input_for_window_attn = partial(tower.reorder, own)
    return tower


def watched_tower(model: nn.Module) -> Tower | None:
    """What watches a layer of the model's vision tower; None: nothing does."""
    return next((_watched[module] for module in model.modules() if module in _watched), None) if _watched else None


def find_tower(model: nn.Module, decoder: nn.Module) -> tuple[str, Any, nn.ModuleList]:
    """The vision tower beside a decoder: its class, the module that holds its layers, and those."""
    inside = set(decoder.modules())
    for module in model.modules():
        if module in inside or decoder in set(module.modules()):
            continue
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1 and _attention_of(child[0]) is not None:
                return type(module).__name__, module, child
    raise UserError(f"{type(model).__name__} has no vision tower whose attention can be read")


def _unshuffles(model: nn.Module, owner: nn.Module) -> bool:
    """Whether a tower orders its patches by the token that they become, and merges them at its end (VideoLLaMA 3)."""
    return any(hasattr(module, "pixel_unshuffle") and owner in set(module.modules()) for module in model.modules())


def _attention_of(layer: nn.Module) -> Any:
    """The attention inside a tower's layer."""
    found = [
        module
        for name, module in layer.named_modules()
        if name
        and "attention" in type(module).__name__.lower()
        and hasattr(vars(module).get("config"), "_attn_implementation")
    ]
    return found[0] if found else None


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    return _watched[module].attention(module, query, key, value, attention_mask, **kwargs)
