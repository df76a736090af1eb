"""PyramidDrop: drop visual tokens in stages, ranked by the last instruction token. CVPR 2025, arXiv 2410.17247."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from focuslib.errors import UserError
from focuslib.kernels.ranking import last_row
from focuslib.kernels.semantic import most_important, tokens_to_keep
from focuslib.methods.base import Method
from focuslib.methods.budget import check_choice, check_share, check_target, schedule_sparsity, solve
from focuslib.methods.depth import checked_layers, layer_numbers
from focuslib.prefill.record import Prefill

SHARES = 10_000  # steps of the share that a target is met with


@dataclass(frozen=True)
class PyramidDrop(Method):
    """PyramidDrop, with the published defaults.

    layers: the first layer of each later stage, as numbers or as shares of the depth (published: 8, 16 and 24 of 32).
    retention: share of the original visual tokens that each of them keeps. target_sparsity: each stage keeps the same
    share of the one before, such that the counted sparsity is this; None: retention holds.
    positions: "published" renumbers the tokens that are left at each stage, "original" leaves their positions.

    Before a stage's first layer, that layer's own norm, projections and rotary embedding rank the tokens by the
    attention of the last token of the prompt, mean over heads. Costs those once more, and one row of attention a stage.
    Results: details importance ([S] float32, of the last stage, −∞ for tokens that it did not see).
    """

    name: ClassVar[str] = "pyramiddrop"

    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    retention: tuple[float, ...] = (0.5, 0.25, 0.125)
    target_sparsity: float | None = None
    positions: str = "published"

    def __post_init__(self):
        layers = checked_layers("method pyramiddrop: layers", self.layers)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "retention", tuple(self.retention))
        if not layers or list(layers) != sorted(set(layers)):
            raise UserError(f"method pyramiddrop: layers {layers} must ascend, one or more")
        if len(layers) != len(self.retention):
            raise UserError(
                f"method pyramiddrop: layers has {len(layers)} entries and retention {len(self.retention)}; give one "
                "retention a layer"
            )
        for share in self.retention:
            check_share(self.name, "retention", share)
        check_target(self.name, self.target_sparsity)
        check_choice(self.name, "positions", self.positions, "original")

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        depth, tokens = prefill.shape.layers, prefill.grid.length
        layers = layer_numbers(self.layers, depth)
        if layers[-1] >= depth:
            raise UserError(f"method pyramiddrop: layer {layers[-1]} does not exist; the model has {depth}")
        keep = [tokens_to_keep(tokens, share, tokens) for share in self.retention]
        prefill.state["keep"] = dict(zip(layers, keep, strict=True))
        prefill.renumber(self.positions == "published")

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        stages = prefill.state["keep"]
        if layer not in stages:
            return hidden, None
        if self.target_sparsity is not None and layer == min(stages):
            stages.update(stages_for(self.name, prefill, list(stages), self.target_sparsity))
        queries, keys, scaling = prefill.queries_and_keys(hidden)
        score = last_row(queries, keys, scaling, prefill.mask)[prefill.visual]
        prefill.note_importance(score, "attention of the last token")
        return hidden, prefill.keep(most_important(score, min(stages[layer], len(prefill.present))))


def stages_for(method: str, prefill: Prefill, layers: list[int], target: float) -> dict[int, int]:
    """Tokens that each stage keeps if each keeps the same share of the one before and the target is met.

    Called before the first of them.
    """
    shape, tokens, record = prefill.shape, len(prefill.present), prefill.record

    def kept(share: int) -> dict[int, int]:
        return {layer: tokens_to_keep(tokens, (share / SHARES) ** n, tokens) for n, layer in enumerate(layers, 1)}

    def sparsity(share: int) -> float:
        present, stages = [tokens], kept(share)
        for layer in range(layers[0], shape.layers):
            present.append(stages.get(layer, present[-1]))
        attended, retained = record.attended + present[1:], record.retained + present[1:]
        return schedule_sparsity(shape, prefill.grid.length, attended, retained)

    return kept(solve(method, target, SHARES, sparsity, f" by stages from layer {layers[0]} of {shape.layers} on"))
