"""Operation counts against the published counts."""

import pytest

from focuslib.prefill.ops import (
    SITES,
    Counts,
    DecoderShape,
    SiteCounts,
    cmc_operations,
    concentrated_operations,
    counted_operations,
    dense_operations,
)


@pytest.mark.parametrize("case", ["focus", "sec_only"])
def test_equals_published_counts(golden, case):
    data, meta = golden(f"ops_{case}")
    shape = DecoderShape(meta["layers"], meta["hidden"], meta["mlp"], meta["heads"], meta["kv_heads"], meta["head_dim"])
    counts = Counts(meta["visual_tokens"])
    for layer in range(meta["layers"]):
        zero = {site: data[f"mask_zero.{site}"][layer, 0] for site in SITES}
        similar = {site: data[f"mask_similar.{site}"][layer, 0] for site in SITES}
        counts.layers.append(
            {
                site: SiteCounts(
                    vectors=zero[site].shape[1],
                    zero=int(zero[site].sum()),
                    similar=int(similar[site].sum()),
                    empty_tokens=int(zero[site].all(1).sum()),
                )
                for site in SITES
            }
        )
    left = concentrated_operations(shape, counts, sec_only=meta["sec_only"])
    dense = dense_operations(shape, meta["visual_tokens"])
    assert (left, dense) == (meta["num_ops"], meta["dense_ops"])
    assert 1 - left / dense == pytest.approx(meta["computation_sparsity"], abs=1e-12)


def test_cmc_without_sparsity_is_dense():
    shape = DecoderShape(layers=3, hidden=64, mlp=160, heads=4, kv_heads=2, head_dim=16)
    assert cmc_operations(shape, 50, 0, 0, 0) == dense_operations(shape, 50)
    assert cmc_operations(shape, 50, 1, 1, 1) == 0


def test_one_count_for_every_method():
    """counted_operations against a token-by-token oracle: every GEMM of every layer, causal attention at half."""
    shape = DecoderShape(layers=3, hidden=8, mlp=12, heads=3, kv_heads=1, head_dim=4)  # queries are wider than hidden
    attended, retained = [10, 6, 6], [6, 6, 4]
    rows = [{"q_proj": 7, "score": 5.0}, {}]

    def layer(seen: int, left: int, own: dict) -> float:
        q, query, score, o = (own.get(site, seen) for site in ("q_proj", "query", "score", "o_proj"))
        gate, down = own.get("gate_proj", left), own.get("down_proj", left)
        projections = q * 8 * (12 + 4 + 4) + o * 12 * 8 + gate * 2 * 8 * 12 + down * 12 * 8
        return projections + (query * seen * 12 + score * seen * 12) / 2

    expected = layer(10, 6, rows[0]) + layer(6, 6, {}) + layer(6, 4, {})
    assert counted_operations(shape, attended, retained, rows) == expected
    assert counted_operations(shape, [10] * 3, [10] * 3, []) == dense_operations(shape, 10)
