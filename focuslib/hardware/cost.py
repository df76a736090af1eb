"""What running the products of a decoder costs, product by product, and the sums over a prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

from focuslib.hardware.accelerators import CLOCK_HZ, WORD_BYTES
from focuslib.prefill.ops import DecoderShape


@dataclass(frozen=True)
class Product:
    """One kind of linear layer: its name, the site whose counts its input has, K inputs and N outputs."""

    name: str
    site: str
    inputs: int
    outputs: int


@cache
def linear_products(shape: DecoderShape) -> tuple[Product, ...]:
    """The seven linear layers of a decoder layer; k and v share the counts of q_proj, up those of gate_proj."""
    return (
        Product("q_proj", "q_proj", shape.hidden, shape.query_width),
        Product("k_proj", "q_proj", shape.hidden, shape.kv_width),
        Product("v_proj", "q_proj", shape.hidden, shape.kv_width),
        Product("o_proj", "o_proj", shape.query_width, shape.hidden),
        Product("gate_proj", "gate_proj", shape.hidden, shape.mlp),
        Product("up_proj", "gate_proj", shape.hidden, shape.mlp),
        Product("down_proj", "down_proj", shape.mlp, shape.hidden),
    )


@dataclass(frozen=True)
class ProductCost:
    """One product of one layer: compute and stall in cycles, multiplications, DRAM and activation in bytes.

    tile_rows, tiles: rows of a tile of its input, and how many tiles those are (attention: of QKᵀ).
    compression: tokens over computed rows (Focus; else 1).
    """

    layer: int
    name: str
    compute: float
    operations: float
    dram: float
    activation: float
    stall: float = 0
    tile_rows: float = 0
    tiles: float = 0
    compression: float = 1.0

    @property
    def cycles(self) -> float:
        return self.compute + self.stall


@dataclass
class Cost:
    """A prefill's products over all layers. dense_operations: multiplications of the dense model."""

    dense_operations: int
    products: list[ProductCost] = field(default_factory=list)

    def total(self, name: str) -> float:
        """The sum of one column of `ProductCost` over all products; fractions lose nothing by their order."""
        values = [getattr(product, name) for product in self.products]
        fractions = any(issubclass(kind, float) for kind in set(map(type, values)))
        return math.fsum(values) if fractions else sum(values)

    @property
    def cycles(self) -> float:
        return self.total("compute") + self.total("stall")

    @property
    def seconds(self) -> float:
        return self.cycles / CLOCK_HZ

    @property
    def compression(self) -> float:
        """Mean over products and layers of tokens over computed rows, the simulator's `total_compression_ratio`."""
        return self.total("compression") / len(self.products) if self.products else float("nan")


def dense_operations(shape: DecoderShape, tokens: int) -> int:
    """Multiplications of the dense prefill over `tokens` visual tokens, causal attention counted by half."""
    linear = sum(product.inputs * product.outputs for product in linear_products(shape))
    return shape.layers * (tokens * linear + tokens**2 * shape.query_width)


def ceiling(amount: float, size: float) -> float:
    """(amount + size − 1) // size: the published rounding, applied as it is to fractions and negative amounts too."""
    return (amount + size - 1) // size


def product_bytes(rows: float, inputs: float, outputs: float, m_tile: int, n_tile: int) -> float:
    """DRAM bytes of rows × inputs × outputs: inputs once an output tile, weights once a row tile, outputs once."""
    return WORD_BYTES * (
        rows * inputs * ceiling(outputs, n_tile) + inputs * outputs * ceiling(rows, m_tile) + rows * outputs
    )
