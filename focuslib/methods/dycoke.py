"""DyCoke: merge tokens that repeat over time, then prune the KV cache while decoding. CVPR 2025, arXiv 2411.15024."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from focuslib.errors import InputError, UserError
from focuslib.kernels.temporal import paired_frames, temporal_merge
from focuslib.methods.base import Method
from focuslib.methods.budget import check_share, check_target, schedule_sparsity, solve
from focuslib.methods.frames import frame_sizes, require_frames
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class DyCoke(Method):
    """DyCoke's prefill half (temporal merging), with the published default (k = 70 %).

    The other half, which chooses anew what the KV cache shows while decoding, is not here: methods act on the prefill.

    retention: share of its tokens that a compared frame keeps (1 − k): those least like the same place's token in the
    frame that it is compared with. Of four frames the first is whole, the others keep this share; of the last four the
    first and the third are whole. target_sparsity: the share that makes the counted sparsity this; None: retention.
    order: "published" puts a frame's tokens in order of their similarity, "place" leaves them in order of their place.
    odd_last: "published" drops a last frame that has no partner, "keep" keeps it.

    Acts on the projected features, before layer 0; positions are renumbered (they stay where they have several axes).
    Costs one comparison of each token.
    """

    name: ClassVar[str] = "dycoke"
    needs_all: ClassVar[str] = "first"

    retention: float = 0.3
    target_sparsity: float | None = None
    order: str = "published"
    odd_last: str = "published"

    def __post_init__(self):
        check_share(self.name, "retention", self.retention, zero=True)
        check_target(self.name, self.target_sparsity)
        for name, other in (("order", "place"), ("odd_last", "keep")):
            if getattr(self, name) not in ("published", other):
                value = getattr(self, name)
                raise UserError(f"method dycoke: {name} is {value!r}; it must be published or {other}")

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        require_frames(self.name, prefill.grid)
        media = frame_sizes(self.name, prefill.grid)
        if any(len(set(sizes)) > 1 for sizes in media):
            raise InputError("method dycoke: frames of one video differ in size; it compares the same place's tokens")
        x, first = hidden[prefill.visual], 0
        rows, content = [], []  # the numbers that stay, and those of the tokens that stand there
        share = self.retention if self.target_sparsity is None else self._share(prefill, media)
        for sizes in media:
            frames = x[first : first + sum(sizes)].view(len(sizes), sizes[0], -1)
            keep = int(share * sizes[0])
            for places in temporal_merge(frames, keep, drop_odd_last=self.odd_last == "published"):
                rows.append(first + places.sort().values)
                content.append(first + places)
                first += sizes[0]
        kept = torch.cat(rows)
        if self.order == "published":
            x = x.clone()
            x[kept] = x[torch.cat(content)]
            hidden = hidden.clone()
            hidden[prefill.visual] = x
        prefill.renumber()
        return hidden, prefill.keep(kept)

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
