"""Cycles and bytes of the baselines: the dense systolic array, AdapTiV and CMC. Counts in, numbers out.

Modelled: visual tokens of one prefill, all linear layers and attention, FP16. Not modelled: text tokens, decoding,
the vision tower, the output head, and DRAM stalls (bandwidth is reported, not enforced), as in the published simulator.
"""

from __future__ import annotations

from collections.abc import Sequence

from focuslib.hardware.accelerators import ADAPTIV, CMC, DENSE, WORD_BYTES, Accelerator
from focuslib.hardware.cost import Cost, ProductCost, ceiling, dense_operations, linear_products, product_bytes
from focuslib.prefill.ops import DecoderShape

_CMC_INTERVAL = 8  # frames a partition


def systolic_cost(
    shape: DecoderShape,
    tokens: int,
    retained: Sequence[int] | None = None,
    first: int | None = None,
    design: Accelerator = DENSE,
) -> Cost:
    """The dense systolic array, on all tokens or on those that a token-dropping method leaves each layer.

    Parameters
    ----------
    shape
        Dimensions of the decoder.
    tokens
        S, visual tokens of the prompt.
    retained
        Visual tokens that each layer's MLP sees (PrefillRecord.retained); None: all. A layer's attention sees what the
        MLP before it saw. What the method itself computes to choose tokens is not modelled.
    first
        Tokens that the first layer's attention sees; None: all. Less for a method that drops before it.
    """
    retained = [tokens] * shape.layers if retained is None else list(retained)
    in_attention = [tokens if first is None else first, *retained[:-1]]
    cost = Cost(dense_operations(shape, tokens))
    for layer, (before, after) in enumerate(zip(in_attention, retained, strict=True)):
        for product in linear_products(shape):
            rows = after if product.site in ("gate_proj", "down_proj") else before
            tiles = ceiling(rows, design.m_tile)
            tile_rows = ceiling(rows, tiles) if tiles else 0
            cost.products.append(
                ProductCost(
                    layer,
                    product.name,
                    compute=_passes(design, tile_rows, tiles, product.inputs, product.outputs),
                    operations=rows * product.inputs * product.outputs,
                    dram=product_bytes(rows, product.inputs, product.outputs, design.m_tile, design.n_tile),
                    activation=WORD_BYTES * product.inputs * rows,
                    tile_rows=tile_rows,
                    tiles=tiles,
                )
            )
        cost.products.append(_systolic_attention(shape, layer, before, design))
    return cost


def _systolic_attention(shape: DecoderShape, layer: int, tokens: int, design: Accelerator) -> ProductCost:
    """QKᵀ and PV of all heads, half of each for causality; both counted as QKᵀ, as published."""
    tiles = ceiling(tokens, design.m_tile)
    tile_rows = ceiling(tokens, tiles) if tiles else 0
    heads, width = shape.heads, shape.head_dim
    both = product_bytes(tokens, width, tokens, design.m_tile, design.n_tile)
    both += product_bytes(tokens, tokens, width, design.m_tile, design.n_tile)
    return ProductCost(
        layer,
        "attention",
        compute=_passes(design, tile_rows, tiles, width, tokens) * heads,
        operations=tokens**2 * shape.query_width,
        dram=heads * both / 2,
        activation=WORD_BYTES * heads * (tokens * width + tokens**2),
        tile_rows=tile_rows,
        tiles=tiles,
    )


def _passes(design: Accelerator, tile_rows: float, tiles: float, inputs: int, outputs: int) -> float:
    """Cycles of all tiles over all weight blocks; none without tiles."""
    array = design.array
    blocks = ceiling(outputs, array.columns) * ceiling(inputs, array.rows)
    return array.tile_cycles(tile_rows) * tiles * blocks if tiles else 0


def adaptiv_cost(shape: DecoderShape, tokens: int, sparsity: float, design: Accelerator = ADAPTIV) -> Cost:
    """AdapTiV, which merges a share `sparsity` of `tokens` visual tokens before the first layer.

    The tokens left, S·(1 − sparsity), are not rounded (as published). Similarity search and merging: ⌈S·K / 64⌉ cycles
    a product.
    """
    left = tokens * (1 - sparsity)
    cost = Cost(dense_operations(shape, tokens))
    for layer in range(shape.layers):
        for product in linear_products(shape):
            cost.products.append(
                ProductCost(
                    layer,
                    product.name,
                    compute=_adaptiv_cycles(design, tokens, left, product.inputs, product.outputs),
                    operations=left * product.outputs * product.inputs,
                    dram=_adaptiv_bytes(design, tokens, left, product.inputs, product.outputs),
                    activation=WORD_BYTES * product.inputs * left,
                )
            )
        heads, width = shape.heads, shape.head_dim
        both = _adaptiv_bytes(design, tokens, left, width, tokens) + _adaptiv_bytes(design, tokens, left, tokens, width)
        cost.products.append(
            ProductCost(
                layer,
                "attention",
                compute=2 * _adaptiv_cycles(design, tokens, left, width, tokens) * heads // 2,
                operations=left * tokens * width * 2 * heads // 2,
                dram=heads * both / 2,
                activation=WORD_BYTES * heads * (left * width + left**2),
            )
        )
    return cost


def _adaptiv_cycles(design: Accelerator, tokens: int, left: float, inputs: int, outputs: int) -> float:
    array, depth = design.array, design.m_tile
    blocks = ceiling(outputs, array.columns) * ceiling(left, array.rows) * ceiling(inputs, depth)
    return depth * blocks + ceiling(tokens * inputs, array.rows)


def _adaptiv_bytes(design: Accelerator, tokens: int, left: float, inputs: int, outputs: int) -> float:
    """The whole input once for merging, and the product of what is left."""
    return WORD_BYTES * tokens * inputs + product_bytes(left, inputs, outputs, design.m_tile, design.n_tile)


def cmc_cost(
    shape: DecoderShape,
    tokens: int,
    frames: int,
    linear: float,
    query: float,
    score: float,
    design: Accelerator = CMC,
) -> Cost:
    """CMC over `tokens` visual tokens of `frames` frames.

    linear, query, score: shares of the rows not computed in linear layers, QKᵀ and PV (cmc_sparsity.csv).
    """
    partitions = ceiling(frames, _CMC_INTERVAL)
    cost = Cost(dense_operations(shape, tokens))
    for layer in range(shape.layers):
        for product in linear_products(shape):
            left = tokens * (1 - linear)
            loads = 0 if product.name in ("k_proj", "v_proj") else tokens * product.inputs  # they share q's input
            cost.products.append(
                ProductCost(
                    layer,
                    product.name,
                    compute=_cmc_cycles(design, tokens, partitions, product.inputs, product.outputs, linear),
                    operations=tokens * product.outputs * product.inputs * (1 - linear),
                    dram=WORD_BYTES * loads
                    + product_bytes(left, product.inputs, product.outputs, design.m_tile, design.n_tile),
                    activation=WORD_BYTES * product.inputs * left,
                )
            )
        cost.products.append(_cmc_attention(shape, layer, tokens, partitions, query, score, design))
    return cost


def _cmc_attention(
    shape: DecoderShape, layer: int, tokens: int, partitions: float, query: float, score: float, design: Accelerator
) -> ProductCost:
    heads, width = shape.heads, shape.head_dim
    cycles = _cmc_cycles(design, tokens, partitions, width, tokens, query)
    cycles += _cmc_cycles(design, tokens, partitions, tokens, width, score)
    both = WORD_BYTES * tokens * (width + tokens)
    both += product_bytes(tokens * (1 - query), width, tokens, design.m_tile, design.n_tile)
    both += product_bytes(tokens * (1 - score), tokens, width, design.m_tile, design.n_tile)
    half = tokens**2 * width
    return ProductCost(
        layer,
        "attention",
        compute=cycles * heads // 2,
        operations=half * (1 - query) * heads // 2 + half * (1 - score) * heads // 2,
        dram=heads * both / 2,
        activation=WORD_BYTES * heads * (tokens * (1 - query) * width + tokens**2 * (1 - score)),
    )


def _cmc_cycles(
    design: Accelerator, tokens: int, partitions: float, inputs: int, outputs: int, sparsity: float
) -> float:
    tile_rows = int(tokens * (1 - sparsity) + partitions - 1) // partitions
    return _passes(design, tile_rows, partitions, inputs, outputs)
