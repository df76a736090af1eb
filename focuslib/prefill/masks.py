"""Attention masks after a drop: which rows of a prompt see which keys, and which cache entries a new token sees."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from focuslib.errors import UserError

MASKED = ("sdpa", "eager")  # implementations whose mask says all: others keep the window to themselves


def require_mask(implementation: str) -> None:
    """Raise UserError unless an implementation takes a mask that says which tokens a window or padding hides."""
    if implementation not in MASKED:
        raise UserError(
            f"{implementation} attention cannot hide padding, or what lies outside a sliding window, once tokens are "
            "dropped; load the model with attn_implementation='sdpa'"
        )


def padding_of(mask: Tensor | None) -> Tensor | None:
    """The padding by a layer's mask: the tokens that do not see themselves, [T] bool; None if there are none."""
    if mask is None:
        return None
    itself = mask[0, 0].diagonal() if mask.dim() == 4 else mask[0]
    padding = ~itself if itself.dtype == torch.bool else itself < 0 if mask.dim() == 4 else itself == 0
    return padding if bool(padding.any()) else None


def full_mask(module: nn.Module, q: Tensor, mask: Tensor | None, implementation: str, arguments: dict) -> Tensor | None:
    """What a layer's queries [1, H, T, d] see, [1, 1 or H, T, T]; None: the tokens up to themselves.

    Without a mask sdpa is causal unless told otherwise, and eager attention sees everything.
    """
    causal = arguments.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is not None or (causal and implementation != "eager"):
        return mask
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=q.device).expand(1, 1, q.shape[2], q.shape[2])


def kept_mask(mask: Tensor | None, kept: Tensor) -> Tensor | None:
    """The mask among the tokens that are kept: [B, H, T, T] or [B, T], kept [K] int64."""
    if mask is None:
        return None
    return mask[..., kept] if mask.dim() == 2 else mask[..., kept, :][..., kept]


def kept_deepstack(masks: Tensor, embeds: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The side inputs of a model that adds visual features after several layers (deepstack), for the tokens kept.

    masks: [1, T] bool, the visual tokens. embeds: [V, D], a row for each of them. kept: [K] int64.
    """
    masks = masks.to(kept.device)
    row = masks[0].cumsum(0) - 1
    masks = masks[:, kept]
    return masks, embeds[row[kept[masks[0]]].to(embeds.device)]


@dataclass
class Origins:
    """Where the entries of a cache sat in the prompt: after a drop, a decoding step's mask follows from this alone.

    The model's own mask is sized by one layer's cache, and counts entries where a window counts tokens.

    length: tokens of the prompt. padding: [length] bool, or None. kept: layer → original index of each entry of the
    prompt, None for all. shifts: layer → by how much later positions fall, where rows were renumbered. now: index of
    the token being decoded.
    """

    length: int
    padding: Tensor | None = None
    kept: list[Tensor | None] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    now: int = 0

    @property
    def dropped(self) -> bool:
        """Whether any layer lacks a token of the prompt."""
        return any(kept is not None for kept in self.kept)

    def entries(self, layer: int) -> int:
        """Entries of the prompt in a layer's cache."""
        kept = self.kept[layer]
        return self.length if kept is None else len(kept)

    def step_mask(self, layer: int, query: Tensor, keys: int, window: int | None, implementation: str) -> Tensor | None:
        """The mask of the token being decoded over the layer's last `keys` entries; None: it sees them all.

        query: the layer's queries [1, H, 1, d]. window: how many tokens back the layer sees, None for all.
        """
        if window is not None and self.now < window:
            window = None  # it reaches back to the first token
        if window is None and self.padding is None:
            return None
        require_mask(implementation)
        device, kept = query.device, self.kept[layer]
        prompt = torch.arange(self.length, device=device) if kept is None else kept.to(device)
        positions = torch.cat([prompt, torch.arange(self.length, self.now + 1, device=device)])
        seen = torch.ones_like(positions, dtype=torch.bool)
        if window is not None:
            seen = self.now - positions < window
        if self.padding is not None:
            seen[: len(prompt)] &= ~self.padding.to(device)[prompt]
        seen = seen[-keys:].view(1, 1, 1, -1)
        if implementation == "eager":
            return torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, torch.finfo(query.dtype).min)
        return seen
