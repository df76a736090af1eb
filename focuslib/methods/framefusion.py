"""FrameFusion: merge tokens that stay alike over time, then prune unimportant ones, to a budget. arXiv 2501.01986."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import InputError, UserError
from focuslib.kernels.semantic import attention_rows, most_important
from focuslib.kernels.temporal import frame_before, temporal_similarity
from focuslib.methods.base import Method
from focuslib.methods.budget import check_target, schedule_sparsity, solve
from focuslib.methods.frames import require_frames
from focuslib.prefill.record import Links, Prefill, PrefillRecord


@dataclass
class _State:
    """How far one prefill has got.

    places: [S], equal for tokens of one place (see Grid.places). root: [S] the visual token that each original one is
    merged into. shares: share of the visual tokens that each merging call removed. importance: [T] of the next call,
    when it prunes.
    """

    places: Tensor
    root: Tensor
    shares: list[float] = field(default_factory=list)
    merging_done: bool = False
    pruning_done: bool = False
    importance: Tensor | None = None


@dataclass(frozen=True)
class FrameFusion(Method):
    """FrameFusion, with the published defaults.

    cost: share of the dense model's computation that is left. similarity_lower_bound: cosine similarity from which a
    token is merged into the same position's token of the frame before. ratio_lower_bound: merging ends with the first
    call that merges a smaller share of the tokens; then the least important ones are pruned, once, to meet the budget.
    target_sparsity: the budget in counted operations instead, of this clip: after what merging left of it, pruning
    keeps what makes the counted sparsity this; merging ends where one more call would come too late. None: cost holds.

    Results: stats share_0, share_1, … (merged shares), kept (share of the visual tokens at the end); details
    merge_root ([S] int64: the token that each original one was merged into, or itself).
    """

    name: ClassVar[str] = "framefusion"

    cost: float = 0.3
    similarity_lower_bound: float = 0.6
    ratio_lower_bound: float = 0.1
    target_sparsity: float | None = None

    def __post_init__(self):
        if not 0 < self.cost <= 1:
            raise UserError(
                f"method framefusion: cost is {self.cost}; it is a share of the dense model's and lies in (0, 1]"
            )
        if not -1 <= self.similarity_lower_bound <= 1:
            raise UserError(
                f"method framefusion: similarity_lower_bound is {self.similarity_lower_bound}; a cosine lies in -1 … 1"
            )
        if not 0 <= self.ratio_lower_bound <= 1:
            raise UserError(f"method framefusion: ratio_lower_bound is {self.ratio_lower_bound}; it must lie in [0, 1]")
        check_target(self.name, self.target_sparsity)

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        require_frames(self.name, prefill.grid)
        places = prefill.grid.places().to(embeds.device)
        prefill.state["progress"] = _State(places, root=torch.arange(prefill.grid.length, device=embeds.device))

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._call(prefill, hidden) if layer == 0 else (hidden, None)

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        progress = prefill.state["progress"]
        if progress.merging_done and not progress.pruning_done:
            last = torch.tensor([queries.shape[1] - 1], device=queries.device)
            rows = attention_rows(queries[:, last], keys, last, scaling, prefill.mask)
            progress.importance = rows.mean((0, 1))
            prefill.note_importance(progress.importance[prefill.visual], "attention of the last token")
        return queries

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._call(prefill, hidden)

    def end(self, prefill: Prefill) -> None:
        progress, record = prefill.state["progress"], prefill.record
        record.stats.update({f"share_{call}": share for call, share in enumerate(progress.shares)})
        record.stats["kept"] = len(prefill.present) / prefill.grid.length
        record.details["merge_root"] = progress.root.cpu()

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        if self.target_sparsity is None:
            return 1 - self.cost
        return 1 - sum(record.attended) / (record.shape.layers * record.grid.length)

    def links(self, record: PrefillRecord) -> Links:
        target, itself = record.details["merge_root"].numpy(), np.arange(record.grid.length)
        kind = np.select([target != itself, ~np.isin(itself, record.left.numpy())], [1, 2], 0)
        kinds = ("kept", "merged into an earlier frame", "pruned")
        return Links("merged runs and pruned tokens", kinds, target.astype(np.int32), kind.astype(np.uint8))

    def _call(self, prefill: Prefill, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        progress = prefill.state["progress"]
        if progress.pruning_done:
            return hidden, None
        ratio = self._ratio(prefill)
        if progress.merging_done:
            progress.pruning_done = True
            kept = most_important(progress.importance[prefill.visual], round((1 - ratio) * len(prefill.present)))
        else:
            hidden, kept = self._merge(prefill, hidden, ratio)
        return hidden, prefill.keep(kept)

    def _merge(self, prefill: Prefill, hidden: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """One merging call: (hidden with run means, the visual rows to keep)."""
        progress, visual = prefill.state["progress"], prefill.visual
        place = progress.places[prefill.present]
        before = frame_before(place)
        similarity = temporal_similarity(hidden[visual], before)
        prefill.note_importance(-similarity, "difference from the frame before, − cosine")
        merged = similarity >= self.similarity_lower_bound
        share = int(merged.sum()) / len(merged)
        if share > ratio:
            merged = torch.zeros_like(merged)
            merged[most_important(similarity, int(ratio * len(merged)))] = True
            progress.merging_done = progress.pruning_done = True
        else:
            progress.shares.append(share)
            left = len(merged) - int(merged.sum())
            progress.merging_done = share < self.ratio_lower_bound or self._too_late(prefill, left)
        first = run_starts(before, merged)
        progress.root = _follow(progress.root, prefill.present, first)
        means, hidden = run_means(hidden[visual], first), hidden.clone()
        hidden[visual] = means
        return hidden, torch.nonzero(~merged).squeeze(1)

    def _ratio(self, prefill: Prefill) -> float:
        """The share of the present visual tokens that has to go now."""
        present = len(prefill.present)
        if self.target_sparsity is None:
            return budget_ratio(prefill.state["progress"].shares, prefill.shape.layers, self.cost)
        calls, layers = len(prefill.record.attended), prefill.shape.layers
        cause = f" by pruning after the attention of layer {calls - 1} of {layers}" if calls else ""
        sparsity = partial(pruned, prefill, calls, present)
        keep = solve(self.name, self.target_sparsity, present, sparsity, cause)
        return (present - keep + 0.25) / present  # a quarter of a token more: truncated or rounded, `keep` stay

    def _too_late(self, prefill: Prefill, left: int) -> bool:
        """Whether the target would be missed if the next call merged and the one after it pruned all that are left."""
        calls = len(prefill.record.attended)
        return self.target_sparsity is not None and pruned(prefill, calls + 2, left, 1) < self.target_sparsity


def pruned(prefill: Prefill, call: int, present: int, kept: int) -> float:
    """The counted sparsity if `present` visual tokens stay until a call and `kept` from then on.

    call: 0 before layer 0, n after the attention of layer n − 1.
    """
    record, layers = prefill.record, prefill.shape.layers
    attended = record.attended + [present] * (min(call, layers) - len(record.attended))
    retained = record.retained + [present] * (min(max(0, call - 1), layers) - len(record.retained))
    attended += [kept] * (layers - len(attended))
    retained += [kept] * (layers - len(retained))
    return schedule_sparsity(prefill.shape, prefill.grid.length, attended, retained)


def budget_ratio(shares: list[float], layers: int, cost: float) -> float:
    """Share of the present visual tokens that has to go now for the whole prefill to cost `cost` of the dense one.

    shares: what each call so far removed; one layer ran after each. Raises InputError if the budget is already spent.
    """
    spent, present = 0.0, 1.0
    for share in shares:
        present *= 1 - share
        spent += present
    left = layers * cost - spent
    if left < 0:
        raise InputError(
            f"method framefusion: cost {cost} cannot be met: {len(shares)} of {layers} layers cost "
            f"{spent / layers:.3f} while merging; raise cost or ratio_lower_bound, or lower similarity_lower_bound"
        )
    if len(shares) >= layers or present == 0:
        return 0.0
    return max(0.0, 1 - left / ((layers - len(shares)) * present))


def run_starts(before: Tensor, merged: Tensor) -> Tensor:
    """The first token of each token's run ([P] int64 rows): a run is a token and the merged ones after it."""
    pointer = torch.where(merged, before, torch.arange(len(before), device=before.device))
    while not torch.equal(following := pointer[pointer], pointer):
        pointer = following
    return pointer


def run_means(x: Tensor, first: Tensor) -> Tensor:
    """Every token replaced by the mean of its run (float32 accumulation); x [P, D], first [P] of `run_starts`."""
    size = torch.zeros(len(x), device=x.device).index_add_(0, first, torch.ones(len(x), device=x.device))
    total = torch.zeros(x.shape, device=x.device).index_add_(0, first, x.float())
    return (total[first] / size[first, None]).to(x.dtype)


def _follow(root: Tensor, present: Tensor, first: Tensor) -> Tensor:
    """Roots of all original tokens after the present ones were merged into the rows `first`. [S] int64 positions."""
    moved = torch.arange(len(root), device=root.device)
    moved[present] = present[first]
    return moved[root]
