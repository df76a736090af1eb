"""FlashVID: diverse tokens stay, the others are merged in trees through time; then pruned in the model. ICLR 2026."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.kernels.ranking import last_row
from focuslib.kernels.semantic import most_important
from focuslib.kernels.trees import compress_segment, diverse_order, segment_lengths
from focuslib.methods.base import Method
from focuslib.methods.budget import check_choice, check_share, check_target, schedule_sparsity
from focuslib.methods.depth import checked_layers, layer_numbers
from focuslib.methods.frames import frame_shapes, frame_sizes, newlines, require_frames
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class FlashVid(Method):
    """FlashVID, with the published defaults.

    retention: share of the tokens that is left, on average over the published model's layers (R). expansion: by how
    much more enter the model, since it drops some. diverse: share of a frame's tokens that are chosen for diversity and
    attention; the others are merged. segment_similarity: cosine of frame means below which a segment ends;
    least_segments: cut until there are so many. similarity: cosine above which a token joins one of the frame before.
    layer: before it the model itself drops tokens, a number or a share of the depth (published: 20 of 28); inner
    retention: the share that the last token's attention keeps there. target_sparsity: the tokens a frame that bring
    the counted sparsity nearest this; None: retention holds. tower_layer: whose attention is read, from the end.
    positions: "published" renumbers the tokens that enter the model (models whose positions have several axes keep
    them), not those that it drops at `layer`; "original" leaves their positions.

    Acts on the projected features, before layer 0, with the tower's attention pooled to them; newline tokens stay.
    Costs a tower layer's attention once more, distances within frames and between consecutive ones, and one row.
    """

    name: ClassVar[str] = "flashvid"
    needs_all: ClassVar[str] = "first"

    retention: float = 0.25
    expansion: float = 1.25
    diverse: float = 0.7
    segment_similarity: float = 0.9
    least_segments: int = 8
    similarity: float = 0.8
    layer: int | float = 0.7
    inner_retention: float = 0.3
    target_sparsity: float | None = None
    tower_layer: int = -1
    positions: str = "published"

    def __post_init__(self):
        check_choice(self.name, "positions", self.positions, "original")
        (layer,) = checked_layers("method flashvid: layer", (self.layer,))
        object.__setattr__(self, "layer", layer)
        if layer == 0:
            raise UserError("method flashvid: layer is 0; the layer before it ranks the tokens, so give 1 or more")
        check_share(self.name, "retention", self.retention)
        check_share(self.name, "diverse", self.diverse, zero=True)
        check_share(self.name, "inner_retention", self.inner_retention)
        check_target(self.name, self.target_sparsity)
        for name, least in (("expansion", 1), ("least_segments", 1), ("similarity", -1), ("segment_similarity", -1)):
            if not getattr(self, name) >= least:
                raise UserError(f"method flashvid: {name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def watched_layer(self) -> int | None:
        return self.tower_layer

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        require_frames(self.name, prefill.grid)
        depth = prefill.shape.layers
        layer = max(1, *layer_numbers((self.layer,), depth))
        if layer >= depth:
            raise UserError(f"method flashvid: layer {layer} does not exist; the model has {depth}")
        prefill.state["layer"] = layer

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        if layer == prefill.state["layer"] - 1:
            prefill.state["importance"] = last_row(queries, keys, scaling, prefill.mask)[prefill.visual]
        return queries

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer == prefill.state["layer"]:
            prefill.renumber(False)
            keep = math.ceil(len(prefill.present) * self.inner_retention)
            importance = prefill.note_importance(prefill.state.pop("importance"), "attention of the last token")
            return hidden, prefill.keep(most_important(importance, keep))
        if layer > 0:
            return hidden, None
        x = hidden[prefill.visual].clone()
        blank = newlines(x, prefill.grid)
        shapes = frame_shapes(self.name, prefill.grid, blank)
        seen = prefill.tower(shapes)
        tokens = (~blank).nonzero().squeeze(1)
        importance = torch.full((len(x),), torch.inf, device=x.device)
        importance[tokens] = seen.received
        prefill.note_importance(importance, "attention in the vision tower")
        media = self._media(prefill, x[tokens], seen.received, shapes)
        compress = cache(partial(self._compress, media))
        budget = math.ceil(max(rows * columns for rows, columns in shapes) * self.retention * self.expansion)
        if self.target_sparsity is not None:
            most = max(received.shape[1] for _, received, _ in media)
            budget = self._budget(prefill, most, lambda tried: len(compress(tried)[1]) + int(blank.sum()))
        merged, numbers = compress(budget)
        rows = tokens[spread(numbers, len(tokens))]
        x[rows] = merged
        hidden = hidden.clone()
        hidden[prefill.visual] = x
        prefill.renumber(self.positions == "published")
        return hidden, prefill.keep(torch.cat([rows, blank.nonzero().squeeze(1)]).sort().values)

    def _media(self, prefill: Prefill, x: Tensor, received: Tensor, shapes: list) -> list[tuple[Tensor, ...]]:
        """Of each medium the tokens [F, T, D], their attention [F, T] and their diverse ones in order [F, k]."""
        media, first, done = [], 0, 0
        for sizes in frame_sizes(self.name, prefill.grid):
            size = {rows * columns for rows, columns in shapes[done : done + len(sizes)]}
            if len(size) > 1:
                raise UserError("method flashvid: the frames of one video differ in size; it compares their tokens")
            (size,) = size
            part = slice(first, first + len(sizes) * size)
            frames, attention = x[part].view(len(sizes), size, -1), received[part].view(len(sizes), size)
            media.append((frames, attention, diverse_order(frames, attention, math.ceil(size * self.diverse))))
            first, done = part.stop, done + len(sizes)
        return media

    def _compress(self, media: list[tuple[Tensor, ...]], budget: int) -> tuple[Tensor, Tensor]:
        """The merged tokens [k, D] of all media and their numbers [k], ascending; budget: tokens a frame."""
        tokens, numbers, first = [], [], 0
        for frames, received, order in media:
            allowed = min(budget, frames.shape[1])
            diverse = math.ceil(allowed * self.diverse)
            start = 0
            for length in segment_lengths(frames.mean(1), self.segment_similarity, self.least_segments):
                part = slice(start, start + length)
                merged, number = compress_segment(
                    frames[part], received[part], diverse, allowed - diverse, self.similarity, order=order[part]
                )
                tokens.append(merged)
                numbers.append(number + first + start * frames.shape[1])
                start += length
            first += received.numel()
        return torch.cat(tokens), torch.cat(numbers)

    def _budget(self, prefill: Prefill, most: int, entering: Callable[[int], int]) -> int:
        """The tokens a frame, at most `most`, that bring the counted sparsity nearest the target, by bisection.

        entering: how many enter the model with such a budget.
        """
        layers, layer, target = prefill.shape.layers, prefill.state["layer"], self.target_sparsity or 0

        def distance(budget: int) -> float:
            enter = entering(budget)
            inner = math.ceil(enter * self.inner_retention)
            present = [enter] * layer + [inner] * (layers - layer)
            return schedule_sparsity(prefill.shape, prefill.grid.length, present) - target

        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if distance(middle) > 0 else (low, middle)
        return min({max(1, low - 1), low}, key=lambda budget: abs(distance(budget)))


def spread(numbers: Tensor, total: int) -> Tensor:
    """Different numbers for tokens of which two may stand at one place: the second moves to the next that is free.

    numbers: [k] int64, ascending. Returns [k] int64, ascending, below `total`.
    """
    spread = numbers.tolist()
    for place in range(1, len(spread)):
        spread[place] = max(spread[place], spread[place - 1] + 1)
    limit = total
    for place in range(len(spread) - 1, -1, -1):
        limit = spread[place] = min(spread[place], limit - 1)
    return torch.tensor(spread, dtype=torch.long, device=numbers.device)
