"""Scores without an order: the catalogue's partition function, some rows' scores, and tables of each query's own."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.index.exact import rank_among, rank_and_top_k
from recjax.index.scoring import log_partition, scores_of

MESHES = [("data=8", "data"), ("data=8", "fsdp"), ("data=4,model=2", "fsdp_model"), ("replica=2,data=4", "fsdp")]
B, V, D = 16, 256, 4


def case(seed, own=False):
    """Integer-valued scores, so that many are equal and every sum is exact; `own`: a table for each query."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (B, D)).astype(np.float32)
    table = rng.integers(-2, 3, (B, V, D) if own else (V, D)).astype(np.float32)
    valid = np.zeros(V, bool)
    valid[2:240] = True
    labels = rng.integers(2, 240, B).astype(np.int32)
    return queries, table, valid, labels


def scores(queries, table):
    return np.einsum("bd,bvd->bv", queries, np.broadcast_to(table, (B, V, D))).astype(np.float64)


def partition(queries, table, valid):
    return np.log(np.exp(scores(queries, table)[:, valid]).sum(axis=1))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_log_partition_is_the_logarithm_of_the_sum(own, block):
    queries, table, valid, _ = case(0, own)
    found = jax.jit(partial(log_partition, block=block))(queries, table, valid=valid)
    np.testing.assert_allclose(found, partition(queries, table, valid), rtol=1e-6)


def test_log_partition_of_large_scores_does_not_overflow():
    queries, table, valid, _ = case(1)
    found = jax.jit(partial(log_partition, block=50))(queries * 1e4, table, valid=valid)
    np.testing.assert_allclose(found, (scores(queries, table) * 1e4)[:, valid].max(axis=1), rtol=1e-3, atol=3)


@pytest.mark.parametrize(("shape", "preset"), MESHES)
@pytest.mark.parametrize("own", [False, True])
def test_sharded_equals_one_device(shape, preset, own):
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    queries, table, valid, labels = case(2, own)
    candidates = np.random.default_rng(3).integers(2, 240, (B, 9)).astype(np.int32)

    def everything(queries, table, labels):
        best = rank_and_top_k(queries, table, labels, 20, valid=jnp.asarray(valid), block=50)
        return (
            log_partition(queries, table, valid=jnp.asarray(valid)),
            *best,
            rank_among(queries, table, labels, jnp.asarray(candidates)),
        )

    expected = jax.jit(everything)(queries, table, labels)
    with mesh.activate():
        placed = jax.device_put(table, mesh.sharding(("batch",) if own else ("items", None)))
        rows = mesh.sharding(("batch",))
        found = jax.jit(everything)(jax.device_put(queries, rows), placed, jax.device_put(labels, rows))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_a_table_of_each_querys_own_equals_brute_force(block):
    queries, table, valid, labels = case(4, own=True)
    exclude = np.random.default_rng(5).integers(2, 240, (B, 6)).astype(np.int32)
    exclude[0, :3] = labels[0]
    found = jax.jit(partial(rank_and_top_k, block=block), static_argnums=3)(
        queries, table, labels, 20, valid=valid, exclude_ids=exclude
    )
    of = scores(queries, table)
    for at in range(B):
        removed = set(exclude[at].tolist()) - {int(labels[at])}
        order = sorted((r for r in range(2, 240) if r not in removed), key=lambda r, s=of[at]: (-s[r], r))
        assert found.rank[at] == order.index(labels[at])
        assert np.asarray(found.rows[at]).tolist() == order[:20]


@pytest.mark.parametrize("own", [False, True])
def test_a_rank_among_candidates_follows_the_same_order(own):
    queries, table, valid, labels = case(6, own)
    rng = np.random.default_rng(7)
    candidates = np.stack([rng.choice(np.setdiff1d(np.arange(2, 240), [x]), 30, replace=False) for x in labels])
    candidates[:, -5:] = 0
    rank = jax.jit(rank_among)(queries, table, labels, candidates.astype(np.int32))
    of = scores(queries, table)
    for at in range(B):
        among = [*candidates[at][candidates[at] > 0].tolist(), int(labels[at])]
        assert rank[at] == sorted(among, key=lambda r, s=of[at]: (-s[r], r)).index(labels[at])
    np.testing.assert_array_equal(
        jax.jit(scores_of)(queries, table, candidates.astype(np.int32)), np.take_along_axis(of, candidates, axis=1)
    )
