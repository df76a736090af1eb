"""Properties that any accelerator model must have, on decoders of any shape."""

from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslib.hardware.accelerators import FOCUS, SEC_ONLY, focus_design
from focuslib.hardware.baselines import adaptiv_cost, cmc_cost, systolic_cost
from focuslib.hardware.cost import ProductCost, ceiling, dense_operations, linear_products
from focuslib.hardware.focus import focus_cost, schedule_counts
from focuslib.prefill.ops import SITES, Counts, DecoderShape, SiteCounts
from focuslib.prefill.ops import dense_operations as counted_dense

TOTALS = ("cycles", "dram", "activation", "operations")


@st.composite
def shapes(draw):
    """Decoders with grouped queries, and heads that need not add up to the hidden width."""
    kv_heads = draw(st.integers(1, 4))
    return DecoderShape(
        layers=draw(st.integers(1, 4)), hidden=draw(st.integers(8, 300)), mlp=draw(st.integers(8, 500)),
        heads=kv_heads * draw(st.integers(1, 4)), kv_heads=kv_heads, head_dim=draw(st.sampled_from([8, 16, 80, 128])),
    )  # fmt: skip


@st.composite
def cases(draw):
    """A shape, counts of a prefill with pruning down to nothing, and an accelerator."""
    shape = draw(shapes())
    tokens, vector = draw(st.integers(1, 3000)), draw(st.sampled_from([8, 16, 32, 64]))
    counts, present = Counts(tokens), tokens
    for _ in range(shape.layers):
        before, present = present, draw(st.integers(0, present))
        sites = {}
        for site in SITES:
            vectors = -(-shape.site_channels(site) // vector)
            left = present if site in ("gate_proj", "down_proj") else before
            zero = (tokens - left) * vectors
            similar = draw(st.integers(0, left * vectors))
            sites[site] = SiteCounts(vectors, zero, similar, tokens - left)
        counts.layers.append(sites)
    m_tile = draw(st.sampled_from([-1, 32, 512, 1024]))
    design = focus_design(
        m_tile, draw(st.sampled_from([8, 32, 128])), draw(st.integers(1, 5)), sec_only=draw(st.booleans())
    )
    return shape, counts, design, draw(st.booleans())


def totals(cost) -> dict[str, float]:
    return {name: cost.total(name) for name in TOTALS}


@settings(max_examples=150, deadline=None)
@given(case=cases(), data=st.data())
def test_more_similar_vectors_never_cost_more(case, data):
    shape, counts, design, corrected = case
    more = deepcopy(counts)
    for layer in more.layers:
        for site in layer.values():
            room = counts.tokens * site.vectors - site.zero - site.similar
            site.similar += data.draw(st.integers(0, room))
    before, after = (totals(focus_cost(shape, c, design, corrected=corrected)) for c in (counts, more))
    for name in TOTALS:
        assert after[name] <= before[name], name


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), tokens=st.integers(1, 3000))
def test_focus_without_sparsity_is_the_dense_array_up_to_its_overheads(shape, tokens):
    counts = schedule_counts(shape, tokens, (), ())
    focus, dense = focus_cost(shape, counts, corrected=True), systolic_cost(shape, tokens)
    tiles = -(-tokens // 1024)
    rounding = 0  # the dense array rounds a tile's rows up, Focus down: less than a row a tile
    for product in linear_products(shape):
        rounding += tiles * -(-product.inputs // 32) * -(-product.outputs // 32)
    rounding = shape.layers * (rounding + shape.heads * tiles * -(-tokens // 32) * -(-shape.head_dim // 32))
    assert 0 <= dense.total("compute") - focus.total("compute") <= rounding
    if tokens % tiles == 0:
        assert dense.total("compute") == focus.total("compute")
    # attention's scores are written once whole: half of them are in the dense array's bytes already
    assert focus.total("dram") == dense.total("dram") + shape.layers * shape.heads * tokens**2
    assert focus.total("activation") == dense.total("activation")
    assert focus.total("operations") == pytest.approx(dense.total("operations"), abs=shape.layers)
    gathers = 7 * shape.layers * 24 * 1024
    assert focus.total("stall") >= gathers


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), tokens=st.integers(1, 3000), frames=st.integers(1, 70))
def test_baselines_without_sparsity_are_dense(shape, tokens, frames):
    dense = systolic_cost(shape, tokens)
    adaptiv, cmc = adaptiv_cost(shape, tokens, 0.0), cmc_cost(shape, tokens, frames, 0.0, 0.0, 0.0)
    for cost in (adaptiv, cmc):
        assert cost.total("operations") == pytest.approx(
            dense_operations(shape, tokens), abs=shape.layers * shape.heads
        )
        assert cost.total("activation") == dense.total("activation")
    assert dense.total("operations") == dense_operations(shape, tokens)
    # the first read of what is to be merged is AdapTiV's own overhead
    own = sum(product.inputs for product in linear_products(shape)) + shape.heads * (shape.head_dim + tokens) / 2
    products = adaptiv.total("dram") - shape.layers * 2 * tokens * own
    assert products >= shape.layers * sum(2 * p.inputs * p.outputs for p in linear_products(shape))


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), tokens=st.integers(1, 3000), data=st.data())
def test_sparser_baselines_never_cost_more(shape, tokens, data):
    low, high = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=2)))
    frames = data.draw(st.integers(1, 70))
    for cost in (lambda s: adaptiv_cost(shape, tokens, s), lambda s: cmc_cost(shape, tokens, frames, s, s, s)):
        dense, sparse = totals(cost(low)), totals(cost(high))
        for name in TOTALS:
            assert sparse[name] <= dense[name] * (1 + 1e-12), name


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), tokens=st.integers(1, 3000), data=st.data())
def test_dropped_tokens_run_on_the_dense_array(shape, tokens, data):
    retained, left = [], tokens
    for _ in range(shape.layers):
        left = data.draw(st.integers(0, left))
        retained.append(left)
    dense, dropping = totals(systolic_cost(shape, tokens)), totals(systolic_cost(shape, tokens, retained))
    assert all(dropping[name] <= dense[name] for name in TOTALS)
    assert totals(systolic_cost(shape, tokens, [tokens] * shape.layers)) == dense
    first = totals(systolic_cost(shape, tokens, retained, first=retained[0]))
    assert all(first[name] <= dropping[name] for name in TOTALS)


def test_nothing_computed_and_nothing_present():
    """n = 0: no compute, and a gathered tile of stall a linear product; x = V − pruned tokens below 0."""
    shape = DecoderShape(layers=2, hidden=64, mlp=96, heads=4, kv_heads=2, head_dim=16)
    all_similar = Counts(100, [{s: SiteCounts(2, 0, 200, 0) for s in SITES}] * 2)
    cost = focus_cost(shape, all_similar)
    assert cost.total("operations") == 2 * 100 * 100 * 64 // 2  # PV alone
    linear = [part for part in cost.products if part.name != "attention"]
    assert all(part.compute == 0 and part.stall > 24 * 1024 for part in linear)  # scattering goes on
    gone = Counts(100, [{s: SiteCounts(2, 200, 0, 100) for s in SITES}] * 2)
    cost = focus_cost(shape, gone)
    assert cost.total("compute") == 0 and cost.total("stall") == 2 * 7 * 24 * 1024
    assert [part.dram for part in cost.products] == [0] * 16
    # 1100 tokens pruned of 2000: x = 2 − 1100, ⌈x / 1024⌉ = −1 by floor division
    pruned = Counts(2000, [{s: SiteCounts(2, 2200, 0, 1100) for s in SITES}] * 2)
    attention = focus_cost(shape, pruned).products[7]
    value = 2 * (900 * 900 * 1 + 900 * 16 * 1 + 900 * 16) * 4
    assert attention.dram == (2 * (900 * 16 * 10 + 16 * 900 * -1) + value) / 2 + 2 * 900 * 2000
    # fewer rows than tiles is not nothing
    one = Counts(2000, [{s: SiteCounts(2, 0, 3998, 0) for s in SITES}] * 2)
    assert focus_cost(shape, one).products[0].compute == 93 * 2 * 2 * 2


def test_one_tile_is_as_long_as_the_prompt():
    shape = DecoderShape(layers=2, hidden=64, mlp=96, heads=4, kv_heads=2, head_dim=16)
    counts = schedule_counts(shape, 3000, (0,), (0.5,))
    for design in (FOCUS, SEC_ONLY):
        one = focus_cost(shape, counts, focus_design(m_tile=-1, sec_only=design.sec_only))
        same = focus_cost(shape, counts, focus_design(m_tile=3000, sec_only=design.sec_only))
        assert one == same


def test_published_rounding():
    assert [ceiling(a, 4) for a in (0, 1, 4, 5, -1, -4, -5)] == [0, 1, 1, 2, 0, -1, -1]
    assert ceiling(4.5, 4) == 1  # a fraction that does not reach a whole number more is dropped
    assert ceiling(5.0, 4) == 2


def test_dense_operations_are_those_of_the_counts():
    shape = DecoderShape(layers=3, hidden=64, mlp=160, heads=4, kv_heads=2, head_dim=16)
    assert dense_operations(shape, 50) == counted_dense(shape, 50)


def test_energy_is_left_out_for_other_buffers():
    for changes in ({"m_tile": 512}, {"vector_size": 8}, {"scatters": 3}, {"sec_only": True}):
        assert np.isnan(focus_design(**changes).buffer_mw) and np.isnan(focus_design(**changes).area_mm2)
    assert focus_design() == FOCUS and focus_design(sec_only=True) == SEC_ONLY
    assert focus_design(vector_size=8).array == replace(FOCUS.array, rows=8, columns=128)
    assert {field.name for field in fields(ProductCost)} >= {"compute", "stall", "dram", "activation", "operations"}
