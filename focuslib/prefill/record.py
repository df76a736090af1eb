"""What one patched forward pass offers a method, and what it leaves: the words that patch and methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.grid import Grid
from focuslib.kernels.similarity import ZERO, count_codes
from focuslib.prefill.decoding import Decoding
from focuslib.prefill.masks import Origins
from focuslib.prefill.ops import Counts, DecoderShape, SiteCounts, counted_operations, dense_operations
from focuslib.prefill.tower import Picture, Shapes, Tower
from focuslib.prefill.trace import BlockGeometry, Trace, TraceWriter


@dataclass
class Ranking:
    """What a method ranked the visual tokens by, for views.

    stage: 2 · layer if that layer was about to run, 2 · layer + 1 from its attention on. by: what the score is.
    scores: [S] float32 (CPU); the highest stay, ∞ stays whatever comes, −∞ for tokens that are not there any more.
    """

    stage: int
    by: str
    scores: Tensor


@dataclass
class PrefillRecord:
    """What a method did in one prefill.

    attended, retained: visual tokens that each layer's attention and each layer's MLP see.
    rows: layer → site → GEMM rows really computed there, where they are fewer (see ops.counted_operations).
    kept: layer → positions after a drop there ([k] int64, CPU).
    counts: vectors computed, similar and zero by layer and site (methods that record sites; else empty).
    codes: the codes of every layer and site (see trace.Trace), on disk; only when a trace was asked for.
    block: which candidates the codes count, as the method that recorded sites said.
    stats: further numbers of the method, by name. details: tensors of the method (CPU), by name, for a closer look.
    rankings: what the method ranked the tokens by, in turn (see Prefill.note_importance).
    decoded: tokens decoded after it. hidden: visual entries of the cache that they did not see, summed over the layers.
    """

    grid: Grid
    shape: DecoderShape
    attended: list[int] = field(default_factory=list)
    retained: list[int] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    counts: Counts = field(init=False)
    codes: TraceWriter | None = None
    block: BlockGeometry = field(default_factory=BlockGeometry)
    stats: dict[str, float] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)
    rankings: list[Ranking] = field(default_factory=list)
    decoded: int = 0
    hidden: int = 0

    def __post_init__(self):
        self.counts = Counts(self.grid.length)

    @property
    def computation_sparsity(self) -> float:
        """1 − operations / dense operations, 0 … 1, from what each layer really computed (ops.counted_operations)."""
        counted = counted_operations(self.shape, self.attended, self.retained, self.rows)
        return 1 - counted / dense_operations(self.shape, self.grid.length)

    @property
    def decoding_sparsity(self) -> float:
        """1 − visual entries that decoded tokens attend to / those of the dense model's cache, 0 … 1; windows aside.

        Of the attention alone: what else a decoded token costs is the same in every method. 0 if none was decoded.
        """
        read = self.decoded * sum(self.attended) - self.hidden
        return 1 - read / (self.decoded * self.shape.layers * self.grid.length) if self.decoded else 0.0

    @property
    def left(self) -> Tensor:
        """Positions (0 … S − 1) of the visual tokens that are left at the end, ascending."""
        return list(self.kept.values())[-1] if self.kept else torch.arange(self.grid.length)


class Prefill:
    """One running prefill, as a method's events see it.

    grid: the original geometry of the visual tokens; shape: the decoder's dimensions.
    present: [P] int64, original positions (0 … S − 1) of the visual tokens still in the sequence, ascending.
    state: the method's own values for the length of this prefill.
    """

    def __init__(self, grid: Grid, shape: DecoderShape, length: int, device: torch.device, keep_codes: bool):
        self.grid = grid
        self.shape = shape
        self.kept: Tensor | None = None  # original sequence index of each row still present; None: all of them
        self.length = length
        self.origins = Origins(length)  # of the cache entries, filled by the patch
        self.present = torch.arange(grid.length, device=device)
        self._rows = grid.rows(device)  # of the visual tokens present, in the current sequence
        self.state: dict[str, Any] = {}
        self.record = PrefillRecord(grid, shape, codes=TraceWriter() if keep_codes else None)
        self.running_mask: Callable[[], Tensor | None] = lambda: None  # of the layer that runs, set by the patch
        self.coming: Callable[[Tensor], tuple[Tensor, Tensor, float]] | None = None  # set by the patch before a layer
        self.watched: Tower | None = None  # set by the patch
        self.renumbering: bool | None = False  # None: the model cannot
        self.positions: Tensor | None = None  # original index whose position each row takes; None: each its own
        self.shift = 0  # by how much the positions of what is decoded fall

    @property
    def mask(self) -> Tensor | None:
        """The running layer's attention mask, [1 or H, T, T] bool (True: seen) or float (to add); None: causal.

        For methods that compute attention rows themselves, in `on_attention`. Raises UserError where the layer's
        attention is more than a masked softmax (soft caps, sinks, biases), so that such rows would be wrong.
        """
        return self.running_mask()

    def queries_and_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor, float]:
        """What the layer about to run would attend with if `hidden` [T, D] entered it; in `before_attention` only.

        For methods that rank before a layer by its own attention. Costs that layer's norm and projections once more.
        Returns queries [H, T, d] and keys [H_kv, T, d] after rotary embedding, and the scaling; `mask` is that layer's.
        """
        if self.coming is None:
            raise ValueError("queries_and_keys is for before_attention: no layer is about to run")
        return self.coming(hidden)

    def tower(self, shapes: Shapes) -> Picture:
        """What the watched layer of the vision tower attended to, pooled to tokens: received [N] and keys [N, d].

        shapes: rows and columns of tokens of each frame, N in all (see tower.Tower.pooled). Of the prompt that was
        prepared last, inside the method's block.
        """
        if self.watched is None:
            raise ValueError("the method watches no layer of the vision tower; see watched_layer")
        return self.watched.pooled(shapes)

    def renumber(self, on: bool = True) -> None:
        """From the next drop on, the rows that are left stand at positions 0, 1, 2 … as if the others had never been.

        The tokens that are decoded follow on. off: later drops leave the positions as they are then. Without effect on
        models whose positions have several axes (M-RoPE): there the rows keep theirs, as in the methods' own ports.
        Sliding windows go on counting the original tokens.
        """
        if self.renumbering is not None:
            self.renumbering = on

    @property
    def visual(self) -> slice | Tensor:
        """The rows of the current sequence that hold visual tokens: what to index it with.

        A slice where they are one run, so that indexing gives a view; else their numbers, [P] int64, ascending.
        """
        if len(self.grid.spans) > 1:
            return self._rows
        return slice(self.grid.start, self.grid.start + len(self.present))

    @property
    def question(self) -> int:
        """The first row of the current sequence after every visual token: what follows asks about them."""
        return self.grid.stop - self.grid.length + len(self.present)

    def keep(self, index: Tensor) -> Tensor:
        """The rows to go on with if of the visual tokens present these alone stay: [k] → [T − P + k], ascending.

        index: numbers 0 … P − 1, or [P] bool. Every text row is among what is returned.
        """
        stays = torch.ones(self.length, dtype=torch.bool, device=self.present.device)
        stays[self._rows] = False
        stays[self._rows[index]] = True
        return stays.nonzero().squeeze(1)

    def write(self, x: Tensor, values: Tensor) -> None:
        """Put values [P, C] of the visual tokens present into x [T, C]: nothing to do if they are x's own memory."""
        if values.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            x[self.visual] = values

    def drop(self, layer: int, rows: Tensor) -> None:
        """Go on with these rows of the current sequence only ([k] int64, ascending; every text row among them).

        Raises ValueError if a row of text is missing.
        """
        number = rows.new_full((self.length,), -1)
        number[self._rows] = torch.arange(len(self.present), device=rows.device)
        number = number[rows]
        visual = number >= 0
        if len(rows) - int(visual.sum()) != self.length - len(self.present):
            raise ValueError("a method drops visual tokens only: rows of text are missing from those to go on with")
        self.kept = rows if self.kept is None else self.kept[rows]
        self.length = len(rows)
        if self.renumbering:
            self.positions = torch.arange(len(rows), device=rows.device)
            self.shift = self.origins.length - len(rows)
        elif self.positions is not None:
            self.positions = self.positions[rows]
        self.present = self.present[number[visual]]
        self._rows = visual.nonzero().squeeze(1)
        self.record.kept[layer] = self.present.cpu()

    def note_importance(self, importance: Tensor, by: str = "score") -> Tensor:
        """Note, for views, what the visual tokens present are ranked by, [P], the highest stay; gives it back.

        by: what the score is, in words. In the record's rankings; the last also in details as importance, [S] float32,
        −∞ for tokens that are not there any more.
        """
        full = importance.new_full((self.grid.length,), -torch.inf, dtype=torch.float32)
        full[self.present] = importance.float()
        self.record.details["importance"] = full = full.cpu()
        stage = len(self.record.attended) + len(self.record.retained)
        self.record.rankings.append(Ranking(stage, by, full))
        return importance

    def record_rows(self, layer: int, site: str, rows: float) -> None:
        """Say that a layer computes only so many GEMM rows at a site (see ops.counted_operations)."""
        self.record.rows += [{} for _ in range(layer + 1 - len(self.record.rows))]
        self.record.rows[layer][site] = rows

    def record_site(
        self,
        layer: int,
        site: str,
        codes: Tensor,
        block: BlockGeometry | None = None,
        numbers: tuple[int, int] | None = None,
    ) -> None:
        """Count, and keep if a trace is recorded, the codes of the present visual tokens at a site ([P, V] uint8).

        block: which candidates the codes count; without it they are ITSELF and ZERO alone. numbers: how many are ZERO,
        and how many neither ITSELF nor ZERO, if they are known.
        """
        self.record.block = block or self.record.block
        absent = self.grid.length - len(self.present)
        vectors = codes.shape[1]
        zero, similar = numbers or count_codes(codes)
        while len(self.record.counts.layers) <= layer:
            self.record.counts.layers.append({})
        counts = self.record.counts.layers[layer][site] = SiteCounts(
            vectors=vectors,
            zero=zero + absent * vectors,
            similar=similar,
            empty_tokens=(int((codes == ZERO).all(1).sum()) if zero else 0) + absent,
        )
        self.record_rows(layer, site, counts.rows(self.grid.length))
        if self.record.codes is not None:
            full = codes.new_full((self.grid.length, vectors), ZERO)
            full[self.present] = codes
            self.record.codes.add(layer, site, full)


@dataclass
class Links:
    """Which token each of the S visual tokens is replaced by or merged into, in methods that work on whole tokens.

    target: [S] int32, the token itself if none. kind: [S] uint8, index into kinds.
    """

    title: str
    kinds: tuple[str, ...]
    target: np.ndarray
    kind: np.ndarray


class Events(Protocol):
    """What the patch tells, and asks, whoever is installed on a model: the events of a prefill, in their order.

    The batch dimension (always 1) is removed. T: tokens of the current sequence, text and visual. A method implements
    this (see methods.base.Method, whose events change nothing); so does whatever watches one.
    """

    @property
    def name(self) -> str:
        """The method's name."""
        raise NotImplementedError

    @property
    def watched_layer(self) -> int | None:
        """The layer of the vision tower whose attention `prefill.tower` tells, may be from the end; None: none."""
        ...

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        """A prefill starts. embeds: [T, D] input embeddings."""
        ...

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Before a layer: hidden [T, D] → (hidden [T, D], rows to keep [k] int64 ascending, or None for all)."""
        ...

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        """At the input of a linear GEMM site (q_proj, o_proj, gate_proj, down_proj): x [T, C] → [T, C].

        x belongs to the method, that may overwrite it: the model reads what is returned, and nothing else of it.
        """
        ...

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """In attention, after rotary embedding: queries [H, T, d], keys [H_kv, T, d] → queries [H, T, d]."""
        ...

    def wants_probabilities(self, prefill: Prefill, layer: int) -> bool:
        """Whether `on_probabilities` is to be called for this layer (forms the attention matrix, head by head)."""
        ...

    def on_probabilities(self, prefill: Prefill, layer: int, head: int, probabilities: Tensor) -> Tensor:
        """One head's softmax attention matrix [T, T] float32 → the matrix to use instead.

        It belongs to the method, that may overwrite it, but not for long: the next head's may take its memory.
        """
        ...

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """After the attention residual add, before the MLP: as `before_attention`."""
        ...

    def end(self, prefill: Prefill) -> None:
        """The prefill's last layer is done."""
        ...

    def on_decoding(self, decoding: Decoding, layer: int) -> Tensor | None:
        """In the attention of a token decoded later: the entries of the layer's cache that it sees; None for all.

        [R] int64, ascending, as `decoding.keep` gives them.
        """
        ...


@dataclass
class Run:
    """What a method did inside a `with` block: one record a prefill, in order."""

    method: Events
    prefills: list[PrefillRecord] = field(default_factory=list)

    @property
    def last(self) -> PrefillRecord:
        """The record of the latest prefill."""
        if not self.prefills:
            raise UserError("nothing was run inside the block yet")
        return self.prefills[-1]

    @property
    def sparsity(self) -> float:
        """Computation sparsity of the latest prefill, 0 … 1, counted from what each layer really computed."""
        return self.last.computation_sparsity

    @property
    def trace(self) -> Trace:
        """The latest prefill's trace; the block must have been entered with trace=True."""
        writer = self.last.codes
        if writer is None or not writer.records:
            raise UserError("no trace was recorded; enter the block with trace=True and a method that records sites")
        block = self.last.block
        return writer.read(self.last.grid, block.frame_block, block.block, block.max_doublings)
