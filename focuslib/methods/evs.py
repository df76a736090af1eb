"""EVS, efficient video sampling: keep the tokens that changed since the frame before. arXiv 2510.14624."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from focuslib.kernels.semantic import most_important
from focuslib.kernels.temporal import frame_before, temporal_similarity
from focuslib.methods.base import Method
from focuslib.methods.budget import check_share, check_target, tokens_for
from focuslib.methods.frames import require_frames
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class Evs(Method):
    """EVS as inference servers ship it, with the published default (q = 75 %).

    retention: share of the visual tokens that are kept (1 − q), those that differ most from the same place's token in
    the frame before; never fewer than the first frames, which all stay. target_sparsity: keep what makes the counted
    sparsity this instead; None: retention holds.

    Acts on the projected features, before layer 0; positions stay. Costs one comparison of each token.
    Results: details importance ([S] float32: 1 − cosine, ∞ where there is no frame before).
    """

    name: ClassVar[str] = "evs"
    needs_all: ClassVar[str] = "first"

    retention: float = 0.25
    target_sparsity: float | None = None

    def __post_init__(self):
        check_share(self.name, "retention", self.retention)
        check_target(self.name, self.target_sparsity)

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer > 0:
            return hidden, None
        require_frames(self.name, prefill.grid)
        before = frame_before(prefill.grid.places()).to(hidden.device)
        change = 1 - temporal_similarity(hidden[prefill.visual], before)
        prefill.note_importance(change, "change since the frame before, 1 − cosine")
        if self.target_sparsity is None:
            keep = int(prefill.grid.length * self.retention)
        else:
            keep = tokens_for(self.name, prefill, self.target_sparsity)
        return hidden, prefill.keep(most_important(change, max(keep, int(change.isinf().sum()))))
