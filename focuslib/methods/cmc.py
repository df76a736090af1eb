"""CMC: codec-style inter-frame motion compensation of tokens, queries and attention rows. ASPLOS 2024."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import InputError, UserError
from focuslib.kernels.motion import (
    INFORMATIVE,
    ZEROED,
    Compensation,
    compensate,
    frame_matches,
    motion_search,
    replaced_shares,
    same_position,
)
from focuslib.methods.base import Method
from focuslib.methods.budget import check_choice
from focuslib.methods.depth import checked_layers, layer_numbers
from focuslib.methods.frames import require_frames
from focuslib.prefill.ops import LINEAR_SITES, cmc_operations, dense_operations
from focuslib.prefill.record import Links, Prefill, PrefillRecord


@dataclass(frozen=True)
class Cmc(Method):
    """CMC, with the published defaults.

    A token is replaced by the nearest token of its interval's I-frame if their L1 distance is below threshold · D:
    linear_threshold: on the input embeddings, once; those matches hold for the inputs of every linear layer.
    query_threshold: on each layer's and head's queries. score_threshold: on each layer's and head's attention rows.
    interval: frames an interval. i_frame: which of them is the I-frame, from 0.
    skip_score_layers: layers whose attention rows are left alone (published: the last of 28), as numbers or as shares
    of the depth (see depth.layer_numbers).
    simplified: compare tokens of the same position only, instead of searching the whole I-frame.
    tail: what happens in a last interval too short to have an I-frame: "published" replaces its tokens of small norm by
    the zeros that the frames were padded with, "leave" does nothing. Either way they count as computed.

    Results: stats linear_sparsity, query_sparsity, attn_score_sparsity (means over layers and heads); details
    linear_match ([S] int64, see motion.frame_matches), query_sparsity, attn_score_sparsity ([layers, heads] float32).
    """

    name: ClassVar[str] = "cmc"
    needs_all: ClassVar[str] = "always"

    linear_threshold: float = 0.4
    query_threshold: float = 0.8
    score_threshold: float = 5e-5
    interval: int = 8
    i_frame: int = 3
    skip_score_layers: tuple[int | float, ...] = (27,)
    simplified: bool = False
    tail: str = "published"

    def __post_init__(self):
        skipped = checked_layers("method cmc: skip_score_layers", self.skip_score_layers)
        object.__setattr__(self, "skip_score_layers", skipped)
        for name in ("linear_threshold", "query_threshold", "score_threshold"):
            if not getattr(self, name) >= 0:
                raise UserError(f"method cmc: {name} is {getattr(self, name)}; it must not be negative")
        if self.interval < 1:
            raise UserError(f"method cmc: interval is {self.interval}; it must be at least 1 frame")
        if not 0 <= self.i_frame < self.interval:
            raise UserError(
                f"method cmc: i_frame is {self.i_frame}; it must lie in 0 … interval − 1 = {self.interval - 1}"
            )
        check_choice(self.name, "tail", self.tail, "leave")

    @property
    def emulates(self) -> bool:
        return True

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        require_frames(self.name, prefill.grid)
        if self.simplified and any(len(set(frames)) > 1 for frames in prefill.grid.media):
            raise InputError("method cmc: simplified compares tokens of one place; the frames here differ in size")
        # query, score: layer → each head's replaced share. heads: layer → matches that are not counted yet
        prefill.state |= {"query": {}, "score": {}, "heads": {}}
        prefill.state["frame"] = prefill.grid.frame_of().to(embeds.device)
        match = self._matches(prefill, embeds[prefill.visual], self.linear_threshold)
        rows = torch.arange(len(embeds), device=embeds.device)[prefill.visual]
        prefill.state |= {"linear": match, "rows": rows, "compensation": Compensation(match, rows, len(embeds))}

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        return prefill.state["compensation"](x)

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        match = self._matches(prefill, queries[:, prefill.visual], self.query_threshold)
        prefill.state["query"][layer] = self._shares(prefill, match)
        return Compensation(match, prefill.state["rows"], queries.shape[1])(queries)

    def wants_probabilities(self, prefill: Prefill, layer: int) -> bool:
        return layer not in layer_numbers(self.skip_score_layers, prefill.shape.layers)

    def on_probabilities(self, prefill: Prefill, layer: int, head: int, probabilities: Tensor) -> Tensor:
        if head == 0:
            self._count_heads(prefill)
        visual = probabilities[prefill.visual]
        match = self._matches(prefill, visual, self.score_threshold)
        compensate(visual, match)
        prefill.write(probabilities, visual)
        prefill.state["heads"].setdefault(layer, []).append(match)
        return probabilities

    def end(self, prefill: Prefill) -> None:
        self._count_heads(prefill)
        record, state = prefill.record, prefill.state
        record.details["linear_match"] = state["linear"].cpu()
        (record.stats["linear_sparsity"],) = self._shares(prefill, state["linear"][None])
        for name, layers in (("query_sparsity", state["query"]), ("attn_score_sparsity", state["score"])):
            record.details[name] = torch.tensor(list(layers.values()))
            record.stats[name] = sum(map(sum, layers.values())) / max(1, sum(map(len, layers.values())))
        tokens = prefill.grid.length
        for layer in state["query"]:
            for site in LINEAR_SITES:
                prefill.record_rows(layer, site, tokens * (1 - record.stats["linear_sparsity"]))
        for name in ("query", "score"):
            for layer, shares in state[name].items():
                prefill.record_rows(layer, name, tokens * (1 - sum(shares) / len(shares)))

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        sparsities = (record.stats[f"{name}_sparsity"] for name in ("linear", "query", "attn_score"))
        left = cmc_operations(record.shape, record.grid.length, *sparsities)
        return 1 - left / dense_operations(record.shape, record.grid.length)

    def links(self, record: PrefillRecord) -> Links:
        match, itself = record.details["linear_match"].numpy(), np.arange(record.grid.length)
        in_i_frame = record.grid.frame_of().numpy() % self.interval == self.i_frame
        places = record.grid.places().numpy()
        kind = np.select([match < 0, in_i_frame, places[match] == places], [0, 1, 2], 3)
        alone = "computed itself"
        if (match == ZEROED).any():
            alone = "computed itself, or zeroed in a last interval without an I-frame"
        kinds = (alone, "I-frame", "same place in the I-frame", "elsewhere in the I-frame")
        target = np.where(match < 0, itself, match)
        return Links("best I-frame match (linear layers)", kinds, target.astype(np.int32), kind.astype(np.uint8))

    def _matches(self, prefill: Prefill, visual: Tensor, threshold: float) -> Tensor:
        """The matches of tokens [S, C], or of several heads' [H, S, C]."""
        search = same_position if self.simplified else motion_search
        matches, first = [], 0
        for frames in prefill.grid.media:
            medium = visual[..., first : first + sum(frames), :]
            if len(frames) == 1:  # an image has nothing to be compensated from
                match = torch.full(medium.shape[:-1], INFORMATIVE, device=visual.device)
            else:
                match = frame_matches(
                    medium, frames, threshold, interval=self.interval, i_frame=self.i_frame, search=search,
                    zero_tail=self.tail == "published",
                )  # fmt: skip
            matches.append(torch.where(match >= 0, match + first, match) if first else match)
            first += sum(frames)
        return torch.cat(matches, -1) if len(matches) > 1 else matches[0]

    def _count_heads(self, prefill: Prefill) -> None:
        """Count a layer's heads together: the device is waited for once, and matches are not kept for long."""
        state = prefill.state
        state["score"] |= {layer: self._shares(prefill, torch.stack(some)) for layer, some in state["heads"].items()}
        state["heads"].clear()

    def _shares(self, prefill: Prefill, matches: Tensor) -> list[float]:
        """The replaced share of several heads' matches, [H, S]."""
        return replaced_shares(matches, prefill.state["frame"], interval=self.interval, i_frame=self.i_frame)
