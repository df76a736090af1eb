"""What a token-concentration method is: hyper-parameters plus the events of a prefill it acts on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.models.base import VLM
from focuslib.prefill.decoding import Decoding
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
    needs_all: ClassVar[str] = (
        ""  # the visual tokens that it needs in a stack: all "first", before layer 0, or "always"
    )

    def __call__(self, vlm: VLM, *, trace: bool = False) -> AbstractContextManager[Run]:
        """Install the method on `vlm` for the length of a `with` block. trace: record every vector's code as well."""
        return install(self, vlm, trace=trace)

    @property
    def emulates(self) -> bool:
        """Whether it stands for work that only its accelerator spares: the model computes it all the same."""
        return False

    @property
    def watched_layer(self) -> int | None:
        """The layer of the vision tower whose attention `prefill.tower` tells, may be from the end; None: none."""
        return None

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

    def on_decoding(self, decoding: Decoding, layer: int) -> Tensor | None:
        """In the attention of a token decoded later: the entries of the layer's cache that it sees; None for all.

        [R] int64, ascending, as `decoding.keep` gives them. The cache keeps them all: a later token may see others.
        """
        return None

    def table_two_sparsity(self, record: PrefillRecord) -> float:
        """A prefill's computation sparsity, 0 … 1, by the convention of the paper's Table II.

        The paper counts each baseline in a way of its own; comparisons use record.computation_sparsity instead, which
        counts the same for every method. A method that the paper does not have keeps this: there is only that count.
        """
        return record.computation_sparsity

    def links(self, record: PrefillRecord) -> Links | None:
        """Which token each one is replaced by or merged into, for views; None where tokens have no such link."""
        return None

    def __or__(self, other: Method) -> Stack:
        """Both at once: `VidCom2() | Focus(selected_layers=(), retention=())`; the left one acts first."""
        return Stack((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class Stack(Method):
    """Several methods on one prefill, in this order at every event; counted, traced and restored as one.

    What the first drops the second does not see. Numbers that two of them record under one name are the last one's.
    Settings are the parts', written method.setting; on the command line its name is vidcom2+focus.
    """

    parts: tuple[Method, ...] = ()

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"methods {'+'.join(names)}: give two or more different ones")

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  of this stack, not of a class
        return "+".join(part.name for part in self.parts)

    @property
    def emulates(self) -> bool:
        return any(part.emulates for part in self.parts)

    @property
    def watched_layer(self) -> int | None:
        layers = {part.watched_layer for part in self.parts} - {None}
        if len(layers) > 1:
            raise UserError(f"methods {self.name}: they read different layers of the vision tower; set one tower_layer")
        return next(iter(layers), None)

    def settings(self) -> dict[str, Any]:
        return {f"{part.name}.{key}": value for part in self.parts for key, value in part.settings().items()}

    def begin(self, prefill: Prefill, embeds: Tensor) -> None:
        prefill.state["parts"] = [({}, prefill.renumbering) for _ in self.parts]
        for part in self._each(prefill):
            part.begin(prefill, embeds)

    def before_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        for part in self._each(prefill):
            if layer == 0 and part.needs_all == "first" and len(prefill.present) < prefill.grid.length:
                raise UserError(f"methods {self.name}: {part.name} compares all visual tokens; put it first")
            hidden = self._dropped(prefill, layer, *part.before_attention(prefill, layer, hidden))
        return hidden, None

    def at_site(self, prefill: Prefill, layer: int, site: str, x: Tensor) -> Tensor:
        for part in self._each(prefill):
            x = part.at_site(prefill, layer, site, x)
        return x

    def on_attention(self, prefill: Prefill, layer: int, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        for part in self._each(prefill):
            queries = part.on_attention(prefill, layer, queries, keys, scaling)
        return queries

    def wants_probabilities(self, prefill: Prefill, layer: int) -> bool:
        return any([part.wants_probabilities(prefill, layer) for part in self._each(prefill)])

    def on_probabilities(self, prefill: Prefill, layer: int, head: int, probabilities: Tensor) -> Tensor:
        for part in self._each(prefill):
            if part.wants_probabilities(prefill, layer):
                probabilities = part.on_probabilities(prefill, layer, head, probabilities)
        return probabilities

    def after_attention(self, prefill: Prefill, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        for part in self._each(prefill):
            hidden = self._dropped(prefill, layer, *part.after_attention(prefill, layer, hidden))
        return hidden, None

    def end(self, prefill: Prefill) -> None:
        for part in self._each(prefill):
            part.end(prefill)

    def on_decoding(self, decoding: Decoding, layer: int) -> Tensor | None:
        whole, seen = decoding.state, None
        for part, (state, _) in zip(self.parts, whole["parts"], strict=True):
            decoding.state = state
            own = part.on_decoding(decoding, layer)
            if own is not None:
                seen = own if seen is None else seen[torch.isin(seen, own)]
        decoding.state = whole
        return seen

    def _each(self, prefill: Prefill) -> Iterator[Method]:
        """The parts, each with its own state and its own way with positions."""
        whole = prefill.state
        for number, part in enumerate(self.parts):
            prefill.state, prefill.renumbering = whole["parts"][number]
            yield part
            whole["parts"][number] = prefill.state, prefill.renumbering
        prefill.state, prefill.renumbering = whole, False

    def _dropped(self, prefill: Prefill, layer: int, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """Drop now what a part does not keep: hidden [T, D] → [k, D]."""
        if rows is None:
            return hidden
        for part in self.parts:
            if part.needs_all == "always":
                raise UserError(
                    f"methods {self.name}: {part.name} needs all visual tokens to the end; stack none that drops"
                )
        prefill.drop(layer, rows)
        return hidden[rows]


def _parts(method: Method) -> tuple[Method, ...]:
    return method.parts if isinstance(method, Stack) else (method,)


@dataclass(frozen=True)
class Dense(Method):
    """The unchanged model, to compare with."""

    name: ClassVar[str] = "dense"
