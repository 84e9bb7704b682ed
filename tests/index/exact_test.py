"""Exact search equals brute force, ties and removals included, on one device and under every preset."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.index.exact import MISS, rank_and_top_k, rank_of, rank_scores, top_k


@partial(jax.jit, static_argnums=2)
def dense(scores, labels, k, valid, exclude):
    return rank_scores(scores, labels, k, valid=valid, exclude_ids=exclude)


def dense_of(scores, labels, k, valid, exclude=((0,),)):
    return dense(*map(jnp.asarray, (scores, labels)), k, *map(jnp.asarray, (valid, exclude)))


MESHES = [("data=8", "data"), ("data=8", "fsdp"), ("data=4,model=2", "fsdp_model"), ("replica=2,data=4", "fsdp")]


def brute_force(scores, labels, k, valid, exclude):
    """Sort every candidate by (score descending, row ascending), one query at a time."""
    best_scores, best_rows, ranks = [], [], []
    for query, label in enumerate(labels):
        removed = set(exclude[query].tolist()) - {int(label)}
        candidates = [r for r in range(len(valid)) if valid[r] and r not in removed]
        order = sorted(candidates, key=lambda r, s=scores[query]: (-s[r], r))
        best = order[:k] + [0] * (k - len(order))
        best_rows.append(best)
        best_scores.append([scores[query][r] if r else -np.inf for r in best])
        ranks.append(order.index(label) if label in order else MISS)
    return np.asarray(best_scores), np.asarray(best_rows), np.asarray(ranks)


def case(seed, *, b=8, v=256, d=4, n=6, num_items=None):
    """Integer-valued scores, so that many are equal and every sum is exact."""
    rng = np.random.default_rng(seed)
    num_items = v - 9 if num_items is None else num_items
    queries = rng.integers(-2, 3, (b, d)).astype(np.float32)
    table = rng.integers(-2, 3, (v, d)).astype(np.float32)
    valid = np.zeros(v, bool)
    valid[2 : 2 + num_items] = True
    labels = rng.integers(2, 2 + num_items, b).astype(np.int32)
    exclude = rng.integers(2, 2 + num_items, (b, n)).astype(np.int32)
    exclude[:, -2:] = 0
    exclude[0, :3] = labels[0]
    return queries, table, valid, labels, exclude


def search(queries, table, valid, labels, exclude, *, k, block):
    return rank_and_top_k(queries, table, labels, k, valid=valid, exclude_ids=exclude, block=block)


on_one_device = jax.jit(search, static_argnames=("k", "block"))


@pytest.mark.parametrize("block", [7, 64, 256, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed, block):
    queries, table, valid, labels, exclude = case(seed)
    scores, rows, ranks = brute_force(queries @ table.T, labels, 20, valid, exclude)
    found = on_one_device(queries, table, valid, labels, exclude, k=20, block=block)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.rank, ranks)
    np.testing.assert_array_equal(found.label_scores, (queries @ table.T)[np.arange(len(labels)), labels])
    for got, want in zip(dense_of(queries @ table.T, labels, 20, valid, exclude), found, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("shape", "preset"), MESHES)
@pytest.mark.parametrize("block", [11, 256])
def test_sharded_equals_one_device(shape, preset, block):
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    queries, table, valid, labels, exclude = case(5, b=16)
    expected = on_one_device(queries, table, valid, labels, exclude, k=40, block=block)
    with mesh.activate():
        sharded = jax.device_put(table, mesh.sharding(("items", None)))
        found = jax.jit(partial(search, k=40, block=block))(queries, sharded, valid, labels, exclude)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("shape", "preset"), MESHES)
def test_no_device_gathers_the_table_or_the_scores(shape, preset):
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    v, d, b, k = 4096, 32, 16, 10
    with mesh.activate():
        args = (
            jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=mesh.sharding(("batch", None))),
            jax.ShapeDtypeStruct((v, d), jnp.float32, sharding=mesh.sharding(("items", None))),
            jax.ShapeDtypeStruct((v,), bool),
            jax.ShapeDtypeStruct((b,), jnp.int32, sharding=mesh.sharding(("batch",))),
            jax.ShapeDtypeStruct((b, 4), jnp.int32, sharding=mesh.sharding(("batch", None))),
        )
        hlo = jax.jit(partial(search, k=k, block=512)).lower(*args).compile().as_text()
    collectives = [line for line in hlo.splitlines() if re.search(r"= .*(all-gather|all-to-all|all-reduce)", line)]
    assert bool(collectives) == (preset != "data")
    for line in collectives:
        for sizes in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", line.split("=", 1)[1].split("(", 1)[0]):
            assert np.prod([int(s) for s in sizes.split(",")]) <= b * k * mesh.size_of("items"), line


def test_fewer_candidates_than_k():
    queries, table, valid, labels, exclude = case(3, v=128, num_items=9)
    best = jax.jit(lambda q, t, v, e: top_k(q, t, 12, valid=v, exclude_ids=e, block=50))
    scores, rows = best(queries, table, valid, exclude)
    expected = brute_force(queries @ table.T, np.full(len(labels), -1), 12, valid, exclude)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(scores, expected[0])
    assert (np.asarray(rows)[:, -3:] == 0).all()


def test_equal_embeddings_rank_by_row_whatever_the_block():
    rng = np.random.default_rng(0)
    table = jnp.asarray(np.repeat(rng.standard_normal((1, 24)), 640, axis=0), jnp.float32)
    queries = jnp.asarray(rng.standard_normal((16, 24)), jnp.float32)
    labels = jnp.asarray(rng.integers(2, 600, 16), jnp.int32)
    valid = jnp.arange(640) >= 2
    for block in (33, 128, 640):
        rank = jax.jit(partial(rank_of, block=block))(queries, table, labels, valid=valid)
        np.testing.assert_array_equal(rank, labels - 2)


def test_the_target_is_never_removed_and_a_row_that_is_no_item_is_a_miss():
    scores, valid = [[9.0, 9.0, 3.0, 2.0, 1.0]], [False, False, True, True, True]
    found = dense_of(scores, [4], 3, valid, [[2, 4]])
    assert found.rank.tolist() == [1] and found.rows.tolist() == [[3, 4, 0]]
    assert dense_of(scores, [1], 1, valid).rank.tolist() == [MISS]


def test_a_score_that_is_not_a_number_comes_last():
    found = dense_of([[0.0, 0.0, np.nan, -1e30, -np.inf, 5.0]], [2], 4, np.arange(6) >= 2)
    assert found.rows.tolist() == [[5, 3, 2, 4]] and found.rank.tolist() == [2]


def test_more_than_the_table_is_refused():
    with pytest.raises(ValueError, match="more than the 5 rows"):
        top_k(jnp.ones((1, 2)), jnp.ones((5, 2)), 6, valid=jnp.ones(5, bool))
