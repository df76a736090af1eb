"""FastV: after a few layers, keep the visual tokens that the last token attends to. ECCV 2024, arXiv 2403.06764."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from focuslib.errors import UserError
from focuslib.kernels.ranking import last_row
from focuslib.kernels.semantic import most_important, tokens_to_keep
from focuslib.methods.base import Method
from focuslib.methods.budget import check_share, check_target, tokens_for
from focuslib.methods.depth import checked_layers, layer_numbers
from focuslib.prefill.record import Prefill


@dataclass(frozen=True)
class FastV(Method):
    """FastV, with the published defaults (R = 50 %, K = 2 of 28 or 32 layers).

    layer: the first layer that runs on fewer tokens (K, at least 1), as a number or as a share of the depth (see
    depth.layer_numbers); the layer before it ranks them by the last token's attention, mean over heads.
    retention: share of the visual tokens that are kept (1 − R). target_sparsity: keep what makes the counted sparsity
    this instead; None: retention holds.

    Positions stay. Costs one row of attention. Results: details importance ([S] float32).
    """

    name: ClassVar[str] = "fastv"

    layer: int | float = 0.07
    retention: float = 0.5
    target_sparsity: float | None = None

    def __post_init__(self):
        (layer,) = checked_layers("method fastv: layer", (self.layer,))
        object.__setattr__(self, "layer", layer)
        if layer == 0:
            raise UserError("method fastv: layer is 0; the layer before it ranks the tokens, so give 1 or more")
        check_share(self.name, "retention", self.retention)
        check_target(self.name, self.target_sparsity)

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        layers = prefill.shape.layers
        first = max(1, *layer_numbers((self.layer,), layers))
        if first >= layers:
            raise UserError(f"method fastv: layer {first} does not exist; the model has {layers}")
        prefill.state["first"] = first

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        if layer == prefill.state["first"] - 1:
            score = last_row(queries, keys, scaling, prefill.mask)[prefill.visual]
            prefill.state["importance"] = prefill.note_importance(score, "attention of the last token")
        return queries

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if layer != prefill.state["first"]:
            return hidden, None
        if self.target_sparsity is None:
            keep = tokens_to_keep(prefill.grid.length, self.retention, len(prefill.present))
        else:
            keep = tokens_for(self.name, prefill, self.target_sparsity)
        return hidden, prefill.keep(most_important(prefill.state.pop("importance"), keep))
