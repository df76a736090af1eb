"""Cycles, stalls and bytes of Focus, from the counts of a trace (or from SEC's schedule alone).

Modelled: visual tokens of one prefill, all linear layers and attention, FP16; scatter and gather beside the array.
Not modelled: text tokens, decoding, vision tower, output head, DRAM stalls, and the buffers of other sizes (CACTI).

"As published" (the default) keeps a defect of the simulator's DRAM count: its attention mask lost a dimension, so QKᵀ
takes "vectors a token − pruned tokens" (negative after pruning) for the tokens present, and counts one head. With
`corrected` those are the tokens present and all heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from focuslib.errors import UserError
from focuslib.hardware.accelerators import FOCUS, PUBLISHED_VECTOR, WORD_BYTES, Accelerator, Array
from focuslib.hardware.cost import (
    Cost,
    Product,
    ProductCost,
    ceiling,
    dense_operations,
    linear_products,
    product_bytes,
)
from focuslib.kernels.semantic import tokens_to_keep
from focuslib.kernels.similarity import num_vectors
from focuslib.prefill.ops import SITES, Counts, DecoderShape, SiteCounts

_GATHERED = 8 * 3  # cycles that gathering takes a row of a tile: 8 candidates, 3 cycles each


def focus_cost(shape: DecoderShape, counts: Counts, design: Accelerator = FOCUS, *, corrected: bool = False) -> Cost:
    """Focus, or SEC alone (design.sec_only), on one prefill.

    Parameters
    ----------
    shape
        Dimensions of the decoder.
    counts
        What each layer's five sites saw over the S original visual tokens.
    design
        FOCUS, SEC_ONLY or one of `focus_design`. The counts stay those of the trace whatever its vectors.
    corrected
        Count attention's DRAM bytes without the published defect (see above).

    Raises
    ------
    UserError
        If the counts are of another number of layers, or a site is missing.
    """
    if len(counts.layers) != shape.layers:
        raise UserError(f"counts of {len(counts.layers)} layers for a decoder of {shape.layers}; give its own trace")
    cost = Cost(dense_operations(shape, counts.tokens))
    for layer, sites in enumerate(counts.layers):
        if missing := [site for site in SITES if site not in sites]:
            raise UserError(f"layer {layer}: no counts of {missing[0]}; record the trace of Focus anew")
        rows = {site: _Rows(counts.tokens, sites[site], design) for site in SITES}
        cost.products += [_linear(layer, product, rows[product.site], design) for product in linear_products(shape)]
        cost.products.append(_attention(shape, layer, rows["query"], design, corrected))
    return cost


class _Rows:
    """A site's counts as rows of a product. S: visual tokens.

    present: tokens not pruned. computed, computed_up: rows computed, down and up to a whole one. scattered: rows that
    the accumulators write. stored: rows computed of the trace, also for SEC alone: its activations are published so.
    masked: what the published mask takes for `present` in attention's DRAM bytes.
    """

    def __init__(self, tokens: int, site: SiteCounts, design: Accelerator):
        vectors = site.vectors
        left = tokens * vectors - site.zero - site.similar
        self.tokens, self.vectors, self.empty = tokens, vectors, site.empty_tokens
        self.present = tokens - site.empty_tokens
        self.stored = int(left / vectors)
        self.computed = self.present if design.sec_only else self.stored
        self.computed_up = self.present if design.sec_only else -(-left // vectors)
        self.scattered = (tokens * vectors - site.zero) // vectors
        self.m_tile = max(tokens, 1) if design.m_tile == -1 else design.m_tile
        self.masked = vectors - site.empty_tokens

    @property
    def compression(self) -> float:
        if not self.computed:
            return float("inf") if self.present else 1.0
        return self.present / self.computed


def _linear(layer: int, product: Product, rows: _Rows, design: Accelerator) -> ProductCost:
    tiles = ceiling(rows.present, rows.m_tile)
    tile_rows = rows.computed // tiles if rows.computed else 0
    array, outputs = design.array, ceiling(product.outputs, design.array.columns)
    blocks = outputs * ceiling(product.inputs, array.rows)
    compute = array.tile_cycles(tile_rows) * tiles * blocks if rows.computed else 0
    vectors = ceiling(product.inputs, design.vector_size)
    scatter = ceiling(rows.scattered * vectors * outputs, design.scatters)
    gather_tile = _GATHERED * rows.m_tile
    gather = gather_tile * tiles * ceiling(product.outputs, design.n_tile)
    weights = product.inputs * product.outputs * tiles
    return ProductCost(
        layer,
        product.name,
        compute=compute,
        stall=max(0, max(scatter, gather) - compute) + gather_tile,
        operations=rows.computed * product.outputs * product.inputs,
        dram=WORD_BYTES
        * (
            rows.computed_up * product.inputs * ceiling(product.outputs, design.n_tile)
            + weights
            + rows.computed_up * product.outputs
        ),
        activation=WORD_BYTES * rows.stored * product.inputs,
        tile_rows=tile_rows,
        tiles=tiles,
        compression=rows.compression,
    )


def _attention(shape: DecoderShape, layer: int, rows: _Rows, design: Accelerator, corrected: bool) -> ProductCost:
    """QKᵀ (computed rows × present tokens) and PV (present × present), half of each for causality."""
    present, array = rows.present, design.array
    blocks = ceiling(present, array.columns) * ceiling(shape.head_dim, array.rows)
    tiles, tile_rows, query_cycles = _tiled(array, rows.computed, rows.m_tile, blocks)
    value_cycles = _tiled(array, present, rows.m_tile, blocks)[2]
    compute = (query_cycles + value_cycles) / 2 * shape.heads
    vectors = ceiling(shape.query_width, design.vector_size)
    scatter = ceiling(rows.scattered * vectors * ceiling(rows.tokens, array.columns), design.scatters)
    width = shape.query_width
    return ProductCost(
        layer,
        "attention",
        compute=compute,
        stall=max(0, scatter - compute),
        operations=rows.computed * present * width // 2 + present**2 * width // 2,
        dram=_attention_bytes(shape, rows, design, corrected),
        activation=WORD_BYTES * (rows.stored * width + present**2 * shape.heads),
        tile_rows=tile_rows,
        tiles=tiles,
        compression=rows.compression,
    )


def _tiled(array: Array, rows: int, m_tile: int, blocks: float) -> tuple[float, float, float]:
    """Tiles, rows a tile and cycles of a product of `rows` rows; nothing of none."""
    if not rows:
        return 0, 0, 0
    tiles = ceiling(rows, m_tile)
    return tiles, rows // tiles, array.tile_cycles(rows // tiles) * tiles * blocks


def _attention_bytes(shape: DecoderShape, rows: _Rows, design: Accelerator, corrected: bool) -> float:
    width, present = shape.head_dim, rows.present
    query_tokens, query_heads = (present, shape.heads) if corrected else (rows.masked, 1)
    query_rows = query_tokens if design.sec_only else rows.computed_up
    query = query_rows * width * ceiling(present, design.n_tile) + width * present * ceiling(query_tokens, rows.m_tile)
    value = product_bytes(present, present, width, rows.m_tile, design.n_tile)
    scores = WORD_BYTES * query_rows * rows.tokens * query_heads
    return (WORD_BYTES * query * query_heads + value * shape.heads) / 2 + scores


def schedule_counts(
    shape: DecoderShape,
    tokens: int,
    selected_layers: Sequence[int],
    retention: Sequence[float],
    vector_size: int = PUBLISHED_VECTOR,
) -> Counts:
    """Counts of SEC alone, which follow from its schedule: no trace needed.

    Parameters
    ----------
    tokens
        S, visual tokens of the prompt.
    selected_layers, retention
        Layers after whose attention tokens are pruned, and the share of S that each keeps.
    """
    counts, present = Counts(tokens), tokens
    keeps = dict(zip(selected_layers, retention, strict=True))
    for layer in range(shape.layers):
        before = present
        if layer in keeps:
            present = tokens_to_keep(tokens, keeps[layer], present)
        sites = {}
        for site in SITES:
            vectors = num_vectors(shape.site_channels(site), vector_size)
            empty = tokens - (present if site in ("gate_proj", "down_proj") else before)
            sites[site] = SiteCounts(vectors, zero=empty * vectors, similar=0, empty_tokens=empty)
        counts.layers.append(sites)
    return counts
