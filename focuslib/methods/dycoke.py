"""DyCoke: merge tokens that repeat over time, then prune the KV cache while decoding. CVPR 2025, arXiv 2411.15024."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.errors import InputError, UserError
from focuslib.kernels.temporal import decoding_choice, paired_frames, paired_similarity, temporal_merge
from focuslib.methods.base import Method
from focuslib.methods.budget import check_choice, check_share, check_target, schedule_sparsity, solve
from focuslib.methods.depth import checked_layers, layer_numbers
from focuslib.methods.frames import frame_sizes, require_frames
from focuslib.prefill.decoding import Decoding
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class DyCoke(Method):
    """DyCoke: merging over time in the prefill, a choice of the KV cache while decoding; with the published defaults.

    retention: share of its tokens that a compared frame keeps (1 − k): those least like the same place's token in the
    frame that it is compared with. Of four frames the first is whole, the others keep this share; of the last four the
    first and the third are whole. target_sparsity: the share that makes the counted sparsity this; None: retention.
    order: "published" puts a frame's tokens in order of their similarity, "place" leaves them in order of their place.
    odd_last: "published" drops a last frame that has no partner, "keep" keeps it.
    positions: "published" renumbers the tokens that are left (models whose positions have several axes keep them),
    "original" leaves their positions.
    decoding_layer: the first layer (L) that sees a part of the visual entries of its cache while decoding, as a number
    or as a share of the depth (published: 3 of 28). decoding_retention: that part (1 − p, published p = 70 %): the
    entries that the new token attends to most in the layer before, mean over heads; 1: all, always.
    decoding_similarity: where this attention's cosine with the last step's reaches it, the step sees all.

    Merging acts on the projected features, before layer 0; each token is compared once. A decoding step costs one more
    row of attention and a copy of the entries that it sees; the record's decoding_sparsity counts those that it does
    not, computation_sparsity is the prefill's.
    Results: details importance ([S] float32: minus the cosine, ∞ in frames that are compared with none).
    """

    name: ClassVar[str] = "dycoke"
    needs_all: ClassVar[str] = "first"

    retention: float = 0.3
    target_sparsity: float | None = None
    order: str = "published"
    odd_last: str = "published"
    positions: str = "published"
    decoding_layer: int | float = 0.1
    decoding_retention: float = 0.3
    decoding_similarity: float = 0.9

    def __post_init__(self):
        (layer,) = checked_layers("method dycoke: decoding_layer", (self.decoding_layer,))
        object.__setattr__(self, "decoding_layer", layer)
        if layer == 0:
            raise UserError("method dycoke: decoding_layer is 0; the layer before it ranks the entries: give 1 or more")
        check_share(self.name, "decoding_retention", self.decoding_retention, zero=True)
        if not -1 <= self.decoding_similarity <= 1:
            value = self.decoding_similarity
            raise UserError(f"method dycoke: decoding_similarity is {value}; a cosine lies in -1 … 1")
        check_share(self.name, "retention", self.retention, zero=True)
        check_target(self.name, self.target_sparsity)
        for name, other in (("order", "place"), ("odd_last", "keep"), ("positions", "original")):
            check_choice(self.name, name, getattr(self, name), other)

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        depth = prefill.shape.layers
        layer = max(1, *layer_numbers((self.decoding_layer,), depth))
        if layer >= depth:
            raise UserError(f"method dycoke: decoding_layer: layer {layer} does not exist; the model has {depth}")
        prefill.state["layer"] = layer

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        require_frames(self.name, prefill.grid)
        media = frame_sizes(self.name, prefill.grid)
        if any(len(set(sizes)) > 1 for sizes in media):
            raise InputError("method dycoke: frames of one video differ in size; it compares the same place's tokens")
        x, first = hidden[prefill.visual], 0
        rows, content, importance = [], [], []  # numbers that stay, those of the tokens that stand there, the ranking
        share = self.retention if self.target_sparsity is None else self._share(prefill, media)
        for sizes in media:
            frames = x[first : first + sum(sizes)].view(len(sizes), sizes[0], -1)
            keep = int(share * sizes[0])
            alike = paired_similarity(frames)
            importance.append(-alike.flatten())
            drop_odd_last = self.odd_last == "published"
            for places in temporal_merge(frames, keep, drop_odd_last=drop_odd_last, similarity=alike):
                rows.append(first + places.sort().values)
                content.append(first + places)
                first += sizes[0]
        kept = torch.cat(rows)
        if self.order == "published":
            x = x.clone()
            x[kept] = x[torch.cat(content)]
            hidden = hidden.clone()
            hidden[prefill.visual] = x
        prefill.note_importance(torch.cat(importance), "difference from an earlier frame, − cosine")
        prefill.renumber(self.positions == "published")
        return hidden, prefill.keep(kept)

    def on_decoding(self, decoding: Decoding, layer: int) -> Tensor | None:
        state = decoding.state
        if layer == state["layer"] - 1 and self.decoding_retention < 1:
            seen = decoding.attention().mean(0)[decoding.visual]
            row = seen.new_zeros(decoding.grid.length)  # a window lets entries go from step to step
            row[decoding.present] = seen
            keep = int(decoding.record.attended[layer] * self.decoding_retention)
            state["shown"] = decoding_choice(row, state.get("row"), keep, self.decoding_similarity)
            state["row"] = row
        shown = state.get("shown")
        return None if shown is None or layer < state["layer"] else decoding.keep(torch.isin(decoding.present, shown))

    def _share(self, prefill: Prefill, media: list[tuple[int, ...]]) -> float:
        """The retention that meets the target."""
        shape, most = prefill.shape, max(map(max, media))

        def share(step: int) -> float:  # step 1 keeps no token of a compared frame, step most + 1 all
            return (step - 0.5) / most

        def sparsity(step: int) -> float:
            kept = sum(self._kept(sizes, share(step)) for sizes in media)
            return schedule_sparsity(shape, prefill.grid.length, [kept] * shape.layers)

        cause = " by merging, which leaves every fourth frame whole, and the first and third of the last four"
        return share(solve(self.name, self.target_sparsity or 0, most + 1, sparsity, cause))

    def _kept(self, sizes: tuple[int, ...], share: float) -> int:
        """How many tokens of a medium stay."""
        frames, size = len(sizes), sizes[0]
        compared = len(paired_frames(frames))
        alone = int(frames % 2 == 1 and frames > 1 and self.odd_last == "published")
        return (frames - compared - alone) * size + compared * int(share * size)
