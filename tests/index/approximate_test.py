"""The approximate index finds nearly what the exact search finds, in its order, and never what was removed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.index.approximate import FEW, ApproximateIndex, Approximation
from recjax.index.exact import top_k

V, D, B, K = 6_000, 24, 64, 20
KINDS = {
    "ivf": Approximation(kind="ivf", probes=16),
    "hnsw": Approximation(kind="hnsw"),
    "every list": Approximation(kind="ivf", lists=20, probes=20),
}


@pytest.fixture(scope="module")
def world():
    """Clustered vectors of unequal length, as catalogues have; queries near them; rows that are no items."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(150, D))
    popularity = rng.lognormal(sigma=0.3, size=(V, 1))
    table = popularity * (centres[rng.integers(0, 150, V)] + 0.5 * rng.normal(size=(V, D)))
    queries = centres[rng.integers(0, 150, B)] + 0.5 * rng.normal(size=(B, D))
    valid = (np.arange(V) >= 2) & (np.arange(V) < V - 50)
    return table.astype(np.float32), queries.astype(np.float32), valid


@pytest.fixture(scope="module")
def indexes(world):
    table, _, valid = world
    return {name: ApproximateIndex(table, valid=valid, config=config) for name, config in KINDS.items()}


exact = jax.jit(lambda q, t, v, e: top_k(q, t, K, valid=v, exclude_ids=e))


@pytest.mark.parametrize(("kind", "least"), [("ivf", 0.95), ("hnsw", 0.95), ("every list", 1.0)])
def test_recall_against_the_exact_search(world, indexes, kind, least):
    table, queries, valid = world
    _, rows = exact(queries, table, valid, np.zeros((B, 1), np.int32))
    assert indexes[kind].recall(queries, np.asarray(rows)) >= least


@pytest.mark.parametrize("filters", ["", "half", "few", "each"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_like_the_exact_search(world, indexes, kind, filters):
    table, queries, valid = world
    rng = np.random.default_rng(1)
    _, best = exact(queries, table, valid, np.zeros((B, 1), np.int32))
    exclude = np.asarray(best)[:, rng.permutation(K)[:7]]
    exclude[:, -2:] = 0
    share = {"": 1.0, "half": 0.5, "few": FEW / V / 2, "each": 0.5}[filters]
    allowed = rng.random((B, V) if filters == "each" else V) < share
    given = {"exclude_ids": exclude, **({"allowed": allowed} if filters else {})}
    scores, rows = indexes[kind].top_k(queries, K, **given)
    expected_scores, expected = map(np.asarray, exact(queries, table, valid & allowed, exclude))
    found = (rows[:, :, None] == expected[:, None, :]).any(axis=2)
    assert found.mean() >= (1.0 if kind == "every list" or filters == "few" else 0.95)
    assert (np.diff(scores) <= 0).all()
    may = np.broadcast_to(valid & allowed, (B, V))
    assert np.take_along_axis(may, rows, axis=1).all() and not (rows[:, :, None] == exclude[:, None, :]).any()
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", queries, table[rows]), rtol=1e-5, atol=1e-5)
    if kind == "every list":
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_are_ordered_by_row(kind):
    table = np.ones((60, 4), np.float32)
    index = ApproximateIndex(table, valid=np.arange(60) > 1, config=KINDS[kind])
    scores, rows = index.top_k(np.ones((1, 4), np.float32), 58)
    assert rows.tolist() == [list(range(2, 60))] and (scores == 4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_items_than_asked_for(kind):
    rng = np.random.default_rng(2)
    table = rng.normal(size=(8, 4)).astype(np.float32)
    index = ApproximateIndex(table, valid=np.arange(8) > 2, config=KINDS[kind])
    scores, rows = index.top_k(table[3:5], 7, exclude_ids=np.array([[4, 0], [4, 7]]))
    assert [sorted(row) for row in rows.tolist()] == [[0, 0, 0, 3, 5, 6, 7], [0, 0, 0, 0, 3, 5, 6]]
    np.testing.assert_array_equal(scores == -np.inf, rows == 0)
    scores, rows = index.top_k(table[3:5], 3, allowed=np.zeros(8, bool))
    assert (rows == 0).all() and (scores == -np.inf).all()


@pytest.mark.parametrize("config", [Approximation(lists=60, probes=1), Approximation(kind="hnsw", links=2, breadth=1)])
def test_a_poor_index_still_gives_as_many_as_are_left(world, config):
    table, queries, valid = world
    index = ApproximateIndex(table[:4000], valid=valid[:4000], config=config)
    allowed = np.random.default_rng(3).random(4000) < 0.7
    exclude = np.asarray(exact(queries, table[:4000], valid[:4000] & allowed, np.zeros((B, 1), np.int32))[1])
    k = 1000
    _, rows = index.top_k(queries, k, exclude_ids=exclude, allowed=allowed)
    assert all(len(set(row) - set(out)) == k for row, out in zip(rows.tolist(), exclude.tolist(), strict=True))
    assert (allowed & valid[:4000])[rows].all()


def test_what_cannot_be_indexed_is_refused():
    with pytest.raises(ConfigError, match="kind = 'tree'"):
        Approximation(kind="tree")
    with pytest.raises(ConfigError, match="probes = 0"):
        Approximation(probes=0)
    for table, valid in ((np.ones((3, 2)), np.zeros(3, bool)), (np.full((3, 2), np.nan), np.ones(3, bool))):
        with pytest.raises(ConfigError, match="at least one item"):
            ApproximateIndex(table.astype(np.float32), valid=valid)
