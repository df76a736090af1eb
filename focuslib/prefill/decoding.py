"""What the decoding steps after a prefill offer a method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from focuslib.prefill.record import Events, Prefill


class Decoding:
    """The tokens that are decoded after one prefill, over one cache, as `on_decoding` sees them.

    grid, record, state: the prefill's own; what a method puts into state is there in the next step.
    """

    def __init__(self, method: Events, prefill: Prefill):
        self.method = method
        self.grid = prefill.grid
        self.record = prefill.record
        self.state = prefill.state
        self.origins = prefill.origins
        self.device = prefill.present.device
        self.layer, self.keys = 0, 0  # the running layer, and the entries of its cache with the new token's own
        self.row: Callable[[], Tensor] = torch.Tensor  # set by the patch
        self.places: dict[Any, tuple[Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict) -> Decoding:
        """Of a copied cache: its steps have a state of their own, and count in the same record."""
        other = copy.copy(self)
        other.state, other.origins = copy.deepcopy((self.state, self.origins), memo)
        other.places = {}
        return other

    @property
    def visual(self) -> Tensor:
        """The entries of the running layer's cache that hold visual tokens: [N] int64, ascending."""
        return self._places()[0]

    @property
    def present(self) -> Tensor:
        """The original positions (0 … S − 1) of those visual tokens: [N] int64, ascending."""
        return self._places()[1]

    def attention(self) -> Tensor:
        """How the new token attends to the K entries of the running layer, itself the last: [H, K] float32.

        Costs that row of attention once more. Raises UserError where it is more than a masked softmax, as Prefill.mask.
        """
        return self.row()

    def keep(self, index: Tensor) -> Tensor:
        """The entries to see if of the N visual ones these alone are seen: [k] → [R] int64, ascending, all text in it.

        index: numbers 0 … N − 1, or [N] bool.
        """
        seen = torch.ones(self.keys, dtype=torch.bool, device=self.device)
        seen[self.visual] = False
        seen[self.visual[index]] = True
        return seen.nonzero().squeeze(1)

    def _places(self) -> tuple[Tensor, Tensor]:
        """`visual` and `present`, looked up once for layers that hold the same tokens."""
        kept, origins = self.origins.kept[self.layer], self.origins
        gone = origins.entries(self.layer) + origins.now + 1 - origins.length - self.keys  # that a window let go
        key = (id(kept), gone)
        if key not in self.places:
            number = torch.full((origins.length,), -1, device=self.device)
            number[self.grid.rows(self.device)] = torch.arange(self.grid.length, device=self.device)
            number = number[gone:] if kept is None else number[kept[gone:]]
            visual = (number >= 0).nonzero().squeeze(1)
            self.places[key] = visual, number[visual]
        return self.places[key]
