"""What a token-concentration method is: hyper-parameters plus the events of a prefill it acts on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from focuslib.models.base import VLM
from focuslib.prefill.patch import install
from focuslib.prefill.record import Events, Links, Prefill, PrefillRecord, Run


@dataclass(frozen=True)
class Method(Events):
    """A token-concentration method: a frozen dataclass of hyper-parameters whose methods are the events of a prefill.

    Use it as a context manager on a loaded model: `with Focus()(vlm) as run: vlm.generate(video, question)`.
    Override the events the method acts on; the defaults change nothing. The batch dimension (always 1) is removed.
    Per-prefill values go in `prefill.state`, results in `prefill.record`.
    """

    name: ClassVar[str]

    def __call__(self, vlm: VLM, *, trace: bool = False) -> AbstractContextManager[Run]:
        """Install the method on `vlm` for the length of a `with` block. trace: record every vector's code as well."""
        return install(self, vlm, trace=trace)

    @property
    def emulates(self) -> bool:
        """Whether it stands for work that only its accelerator spares: the model computes it all the same."""
        return False

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, by name."""
        return asdict(self)

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        """A prefill starts. embeds: [T, D] input embeddings."""

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Before a layer: hidden [T, D] → (hidden [T, D], rows to keep [k] int64 ascending, or None for all)."""
        return hidden, None

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        """At the input of a linear GEMM site (q_proj, o_proj, gate_proj, down_proj): x [T, C] → [T, C].

        x belongs to the method, that may overwrite it: the model reads what is returned, and nothing else of it.
        """
        return x

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """In attention, after rotary embedding: queries [H, T, d], keys [H_kv, T, d] → queries [H, T, d]."""
        return queries

    def wants_probabilities(self, prefill: Prefill, layer: int) -> bool:
        """Whether `on_probabilities` is to be called for this layer (forms the attention matrix, head by head)."""
        return False

    def on_probabilities(self, prefill: Prefill, layer: int, head: int, probabilities: Tensor) -> Tensor:
        """One head's softmax attention matrix [T, T] float32 → the matrix to use instead.

        It belongs to the method, that may overwrite it, but not for long: the next head's may take its memory.
        """
        return probabilities

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """After the attention residual add, before the MLP: as `before_attention`."""
        return hidden, None

    def end(self, prefill: Prefill) -> None:
        """The prefill's last layer is done."""

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        """A prefill's computation sparsity, 0 … 1, by the convention of the paper's Table II.

        The paper counts each baseline in a way of its own; comparisons use record.computation_sparsity instead, which
        counts the same for every method. A method that the paper does not have keeps this: there is only that count.
        """
        return record.computation_sparsity

    def links(self, record: PrefillRecord) -> Links | None:
        """Which token each one is replaced by or merged into, for views; None where tokens have no such link."""
        return None


@dataclass(frozen=True)
class Dense(Method):
    """The unchanged model, to compare with."""

    name: ClassVar[str] = "dense"
