"""Layers as numbers, or as shares of the depth, so that one setting suits 12 layers as well as 64."""

from collections.abc import Sequence
from typing import Any

from focuslib.errors import UserError

Layers = tuple[int | float, ...]  # numbers from 0, or shares of the depth above 0 and below 1


def checked_layers(what: str, layers: Any) -> Layers:
    """Layers as a tuple; what: method and setting. Raises UserError unless all are numbers, or all shares."""
    layers = tuple(int(layer) if float(layer).is_integer() else float(layer) for layer in layers)
    if any(layer < 0 or (layer > 1 and layer != int(layer)) for layer in layers) or len(set(map(type, layers))) > 1:
        raise UserError(f"{what} {layers} must be layer numbers from 0, or shares of the depth between 0 and 1")
    return layers


def layer_numbers(layers: Sequence[int | float], depth: int) -> list[int]:
    """The layers of a decoder of so many: a share s is layer round(s · depth), the last at most.

    On a shallow decoder several shares can be one layer. Numbers stay as they are, also those that it does not have.
    """
    return [layer if isinstance(layer, int) else min(round(layer * depth), depth - 1) for layer in layers]
