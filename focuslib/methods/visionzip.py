"""VisionZip: keep the tokens that the vision tower attends to, and merge the others into a few. CVPR 2025."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.kernels.contextual import add_means, dominant_and_contextual
from focuslib.methods.base import Method
from focuslib.methods.budget import check_choice, check_share, check_target, tokens_for
from focuslib.methods.frames import frame_shapes, newlines
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class VisionZip(Method):
    """VisionZip, with the published shares.

    retention: share of each frame's tokens that the language model gets. contextual: share of those that others are
    merged into (published: 10 of 64, 20 of 128, 30 of 192); the rest are the dominant ones. target_sparsity: keep what
    makes the counted sparsity this; None: retention holds. tower_layer: whose attention and keys are read.
    order: "published" puts a frame's dominant tokens first, then the merged ones; "place" leaves all at their place.
    positions: "published" renumbers the tokens that are left (models whose positions have several axes keep them),
    "original" leaves their positions.

    The tower's attention (of its CLS token; without one the mean over rows) and keys are pooled to the language model's
    tokens, and the tokens are merged after the projector (published: before it, without pooling, on one picture).
    Newline tokens of a video's rows stay. Costs the attention of one tower layer once more.
    Results: details importance ([S] float32), joins ([S] int64).
    """

    name: ClassVar[str] = "visionzip"
    needs_all: ClassVar[str] = "first"

    retention: float = 0.25
    contextual: float = 0.15625
    target_sparsity: float | None = None
    tower_layer: int = -2
    order: str = "published"
    positions: str = "published"

    def __post_init__(self):
        for name, other in (("order", "place"), ("positions", "original")):
            check_choice(self.name, name, getattr(self, name), other)
        check_share(self.name, "retention", self.retention)
        check_share(self.name, "contextual", self.contextual, zero=True)
        check_target(self.name, self.target_sparsity)

    @property
    def watched_layer(self) -> int | None:
        return self.tower_layer

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        x = hidden[prefill.visual].clone()
        blank = newlines(x, prefill.grid)
        shapes = frame_shapes(self.name, prefill.grid, blank)
        seen = prefill.tower(shapes)
        tokens = (~blank).nonzero().squeeze(1)  # of the frames, without newlines
        total = len(tokens) * self.retention
        if self.target_sparsity is not None:
            total = max(len(shapes), tokens_for(self.name, prefill, self.target_sparsity) - int(blank.sum()))
        joins, stays = torch.arange(len(x), device=x.device), blank.clone()
        first = used = 0
        for done, (rows, columns) in enumerate(shapes, 1):
            index = tokens[first : first + rows * columns]
            count = max(1, min(len(index), round(total * done / len(shapes)) - used))
            part = slice(first, first + len(index))
            contextual = min(round(count * self.contextual), count - 1)
            kept, own = dominant_and_contextual(seen.received[part], seen.keys[part], count - contextual, contextual)
            places = index[kept] if self.order == "place" else index[kept].sort().values  # dominant ones come first
            x[places] = add_means(x[index], own)[kept]
            joins[index] = index[own]
            stays[index[kept]] = True
            first, used = first + len(index), used + count
        importance = torch.full((len(x),), torch.inf, device=x.device)
        importance[tokens] = seen.received
        prefill.note_importance(importance, "attention in the vision tower")
        prefill.record.details["joins"] = joins.cpu()
        hidden = hidden.clone()
        hidden[prefill.visual] = x
        prefill.renumber(self.positions == "published")
        return hidden, prefill.keep(stays)
