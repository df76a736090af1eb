"""Operation counts against the published counts."""

import pytest

from focuslib.prefill.ops import (
    SITES,
    Counts,
    DecoderShape,
    SiteCounts,
    cmc_operations,
    concentrated_operations,
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
