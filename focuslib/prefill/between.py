"""What a decoder does between its layers: nothing, or something for every token, that a drop would not reach."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from focuslib.errors import UserError
from focuslib.prefill.record import Prefill


class Between:
    """Watches a prefill between two layers; after a drop, refuses a decoder that changes hidden states there.

    Qwen3-VL adds visual features there in a method of its own, which the patch replaces (`follow`); others write it
    into the loop over their layers (Granite 4 Vision), out of reach.

    left: what the layer before gave, in a layer's first prefill. found: the layers before which something was done.
    """

    def __init__(self, decoder: Any):
        self.name = type(decoder).__name__
        self.left: Tensor | None = None
        self.inside = False
        self.known: set[int] = set()
        self.found: set[int] = set()

    def begin(self) -> None:
        """A forward of the decoder starts."""
        self.left, self.inside = None, False

    @contextmanager
    def layer(self, index: int, hidden: Tensor, prefill: Prefill | None) -> Iterator[None]:
        """Around a layer of the decoder, whose input is hidden [1, T, D]."""
        if prefill is not None:
            if index not in self.known and self.left is not None and not _same(self.left, hidden):
                self.found.add(index)
            if index in self.found and prefill.kept is not None:
                raise self._refusal(index)
            self.known.add(index)
        self.left, self.inside = None, True
        yield
        self.inside = False

    def follow(self, index: int, hidden: Tensor) -> None:
        """Layer `index` is to start from hidden [1, T, D], as far as the patch knows."""
        self.left = hidden.clone() if index not in self.known else None

    def guarded(self, own: Callable, prefill: Callable[[], Prefill | None]) -> Callable:
        """The decoder's own forward, that ends in one line if it fails between two layers after a drop."""

        @wraps(own)
        def forward(*args, **kwargs):
            try:
                return own(*args, **kwargs)
            except (UserError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, IndexError, ValueError) as error:
                running = prefill()
                if self.inside or running is None or running.kept is None:
                    raise
                raise self._refusal(len(running.record.retained)) from error

        return forward

    def _refusal(self, layer: int) -> UserError:
        return UserError(
            f"{self.name} changes hidden states before its layer {layer}, for every token of the prompt, which this "
            "patch does not follow once tokens are dropped; use a method, or settings, that drop from then on only"
        )


def _same(left: Tensor, hidden: Tensor) -> bool:
    left = left.to(hidden.device)
    return left.shape == hidden.shape and torch.allclose(left, hidden, rtol=0, atol=0, equal_nan=True)
