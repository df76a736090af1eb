"""What a token-concentration method is: hyper-parameters plus the events of a prefill it acts on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from focuslib.grid import VisualGrid
from focuslib.ops import Counts, DecoderShape, SiteCounts
from focuslib.similarity import ITSELF, ZERO
from focuslib.trace import TraceWriter

if TYPE_CHECKING:
    from focuslib.models.base import VLM
    from focuslib.patch import Run


@dataclass
class PrefillRecord:
    """What a method did in one prefill.

    retained: visual tokens each layer's MLP sees. kept: layer → positions after a drop there ([k] int64, CPU).
    counts: vectors computed, similar and zero by layer and site (methods that record sites; else empty).
    codes: the codes of every layer and site (see trace.Trace), on disk; only when a trace was asked for.
    stats: further numbers of the method, by name. details: tensors of the method (CPU), by name, for a closer look.
    """

    grid: VisualGrid
    shape: DecoderShape
    retained: list[int] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    counts: Counts = None
    codes: TraceWriter | None = None
    stats: dict[str, float] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.counts = Counts(self.grid.length)


class Prefill:
    """One running prefill, as a method's events see it.

    grid: the original geometry of the visual tokens; shape: the decoder's dimensions.
    present: [P] int64, original positions (0 … S − 1) of the visual tokens still in the sequence, ascending.
    state: the method's own values for the length of this prefill.
    """

    def __init__(self, grid: VisualGrid, shape: DecoderShape, length: int, device: torch.device, keep_codes: bool):
        self.grid = grid
        self.shape = shape
        self.kept: Tensor | None = None  # original sequence index of each row still present; None: all of them
        self.length = length
        self.present = torch.arange(grid.length, device=device)
        self.state: dict[str, Any] = {}
        self.record = PrefillRecord(grid, shape, codes=TraceWriter() if keep_codes else None)

    @property
    def visual(self) -> slice:
        """The rows of the current sequence that hold visual tokens."""
        return slice(self.grid.start, self.grid.start + len(self.present))

    def drop(self, layer: int, rows: Tensor) -> None:
        """Go on with these rows of the current sequence only ([k] int64, ascending; every text row among them)."""
        self.kept = rows if self.kept is None else self.kept[rows]
        self.length = len(rows)
        visual = rows[(rows >= self.visual.start) & (rows < self.visual.stop)] - self.visual.start
        self.present = self.present[visual]
        self.record.kept[layer] = self.present.cpu()

    def record_site(self, layer: int, site: str, codes: Tensor) -> None:
        """Count, and keep if a trace is recorded, the codes of the present visual tokens at a site ([P, V] uint8)."""
        absent = self.grid.length - len(self.present)
        vectors = codes.shape[1]
        is_zero = codes == ZERO
        while len(self.record.counts.layers) <= layer:
            self.record.counts.layers.append({})
        self.record.counts.layers[layer][site] = SiteCounts(
            vectors=vectors,
            zero=int(is_zero.sum()) + absent * vectors,
            similar=int((~is_zero & (codes != ITSELF)).sum()),
            empty_tokens=int(is_zero.all(1).sum()) + absent,
        )
        if self.record.codes is not None:
            full = codes.new_full((self.grid.length, vectors), ZERO)
            full[self.present] = codes
            self.record.codes.add(layer, site, full)


@dataclass(frozen=True)
class Method:
    """A token-concentration method: a frozen dataclass of hyper-parameters whose methods are the events of a prefill.

    Use it as a context manager on a loaded model: `with Focus()(vlm) as run: vlm.generate(video, question)`.
    Override the events the method acts on; the defaults change nothing. The batch dimension (always 1) is removed.
    Per-prefill values go in `prefill.state`, results in `prefill.record`.
    """

    name: ClassVar[str]

    def __call__(self, vlm: VLM, *, trace: bool = False) -> AbstractContextManager[Run]:
        """Install the method on `vlm` for the length of a `with` block. trace: record every vector's code as well."""
        from focuslib.patch import install  # the patch imports this module

        return install(self, vlm, trace=trace)

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, by name."""
        return asdict(self)

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        """A prefill starts. embeds: [T, D] input embeddings."""

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Before a layer: hidden [T, D] → (hidden [T, D], rows to keep [k] int64 ascending, or None for all)."""
        return hidden, None

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        """At the input of a linear GEMM site (q_proj, o_proj, gate_proj, down_proj): x [T, C] → [T, C]."""
        return x

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """In attention, after rotary embedding: queries [H, T, d], keys [H_kv, T, d] → queries [H, T, d]."""
        return queries

    def wants_probabilities(self, prefill: Prefill, layer: int) -> bool:
        """Whether `on_probabilities` is to be called for this layer (forms the attention matrix, head by head)."""
        return False

    def on_probabilities(self, prefill: Prefill, layer: int, head: int, probabilities: Tensor) -> Tensor:
        """One head's softmax attention matrix [T, T] float32 → the matrix to use instead."""
        return probabilities

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """After the attention residual add, before the MLP: as `before_attention`."""
        return hidden, None

    def end(self, prefill: Prefill) -> None:
        """The prefill's last layer is done."""

    def computation_sparsity(self, record: PrefillRecord) -> float:
        """1 − operations / dense operations of a prefill, by the paper's count (Table II)."""
        return 0.0


@dataclass(frozen=True)
class Dense(Method):
    """The unchanged model, to compare with."""

    name: ClassVar[str] = "dense"
