"""Every baseline scores as its formula says, written out user by user, and ranks by the rule of the models."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from recjax.baselines import item_graph, item_knn
from recjax.baselines.harness import choose, rank_batches
from recjax.baselines.item_graph import GraphSettings, ItemGraph, Transitions
from recjax.baselines.item_knn import ItemKnn, KnnSettings, neighbour_lists
from recjax.baselines.popularity import Popularity

V = 24


def rank_all(scorer, records, valid, k, *, remove_seen):
    found = list(rank_batches(scorer, records, valid, k, remove_seen=remove_seen))
    assert np.concatenate([f.user_index for f in found]).tolist() == records.user_index.tolist()
    assert np.concatenate([f.label for f in found]).tolist() == records.label.tolist()
    return np.concatenate([f.rank for f in found]), np.concatenate([f.rows for f in found])


@pytest.fixture
def world(records_of):
    return lambda seed: records_of(rows_of(seed))


def rows_of(seed, users=30):
    rng = np.random.default_rng(seed)
    rows = []
    for u in range(users):
        items = rng.integers(2, V - 2, int(rng.integers(1, 12))).astype(np.int32)
        rows.append({"user_index": u, "items": items, "label": np.int32(rng.integers(2, V - 2))})
    return rows


def history(records, u):
    return records.items[records.offsets[u] : records.offsets[u + 1]].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_item_graph_equals_its_formula(seed, world):
    records, settings = world(seed), GraphSettings(steps=3, step_decay=0.7, last=4, history_decay=0.6, popularity=0.3)
    edge, count = collections.defaultdict(float), collections.Counter()
    for u in range(len(records)):
        items = history(records, u)
        count.update(items)
        for t, s in itertools.product(range(len(items)), (1, 2, 3)):
            if t + s < len(items):
                edge[items[t], items[t + s]] += 0.7 ** (s - 1)
    expected = np.zeros((len(records), V))
    for u in range(len(records)):
        for age, i in enumerate(reversed(history(records, u)[-4:])):
            for j in range(V):
                expected[u, j] += 0.6**age * edge[i, j] / (max(1, count[i]) * max(1, count[j]) ** 0.3)
    scorer = ItemGraph(Transitions(records, V, 10), settings)
    np.testing.assert_allclose(scorer.scores(records), expected, rtol=1e-5)
    assert scorer.settings["steps"] == 3


def test_item_graph_is_directed_and_stays_inside_a_user(records_of):
    rows = [{"user_index": 0, "items": np.array([2, 3], np.int32)}, {"user_index": 1, "items": np.array([4], np.int32)}]
    graph = Transitions(records_of(rows), 6, 3).graph(GraphSettings(steps=3)).toarray()
    assert graph[2, 3] > 0 and np.count_nonzero(graph) == 1


def test_too_many_edges_lose_the_lightest(monkeypatch, world):
    records = world(0)
    whole = Transitions(records, V, 5).graph(GraphSettings(steps=5))
    monkeypatch.setattr(item_graph, "MAX_EDGES", whole.nnz // 2)
    assert Transitions(records, V, 5).graph(GraphSettings(steps=5)).nnz < whole.nnz


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("neighbours", [3, 100])
def test_item_knn_equals_its_formula(seed, neighbours, monkeypatch, world):
    monkeypatch.setattr(item_knn, "_BLOCK_CELLS", 5 * V)
    records = world(seed)
    lists = neighbour_lists(records, V, neighbours=neighbours, shrinks=(0.0, 2.0))
    users = {i: {u for u in range(len(records)) if i in history(records, u)} for i in range(V)}
    for shrink, found in lists.items():
        similarity = np.zeros((V, V))
        for i, j in itertools.product(range(V), repeat=2):
            if i != j and users[i] & users[j]:
                norm = np.sqrt(len(users[i]) * len(users[j]))
                similarity[i, j] = np.float32(len(users[i] & users[j])) / (np.float32(norm) + np.float32(shrink))
        for i in range(V):
            strongest = sorted(range(V), key=lambda j, i=i: (-np.float32(similarity[i, j]), j))[neighbours:]
            similarity[i, strongest] = 0
        np.testing.assert_allclose(found.toarray(), similarity, rtol=1e-5)
        settings = KnnSettings(neighbours=neighbours, shrink=shrink, history_decay=0.5)
        expected = np.zeros((len(records), V))
        for u in range(len(records)):
            for age, i in enumerate(reversed(history(records, u))):
                expected[u] += 0.5**age * similarity[i]
        np.testing.assert_allclose(ItemKnn(found, settings).scores(records), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("remove_seen", [True, False])
def test_the_harness_ranks_by_score_then_row_over_uneven_batches(remove_seen, monkeypatch, world):
    monkeypatch.setattr("recjax.baselines.harness._CELLS", 7 * V)
    records, valid = world(1), (np.arange(V) >= 2) & (np.arange(V) < V - 2)
    count = np.random.default_rng(0).integers(0, 3, V).astype(np.float32)
    rank, rows = rank_all(Popularity(count), records, valid, 5, remove_seen=remove_seen)
    for u in range(len(records)):
        label = int(records.label[u])
        removed = set(history(records, u)) - {label} if remove_seen else set()
        order = sorted((r for r in range(2, V - 2) if r not in removed), key=lambda r: (-count[r], r))
        assert rank[u] == order.index(label)
        assert rows[u].tolist() == order[:5]


def test_the_best_settings_on_validation_are_chosen(world):
    records, valid = world(2), np.arange(V) >= 2

    class Oracle:
        def __init__(self, strength):
            self.strength = strength

        @property
        def settings(self):
            return {"strength": self.strength}

        def scores(self, records):
            return (np.arange(V)[None, :] == records.label[:, None]).astype(np.float32) * self.strength

    chosen = choose(Oracle, [-1.0, 0.0, 1.0, 2.0], records, valid, remove_seen=True)
    assert chosen.settings == {"strength": 1.0}
    with pytest.raises(ValueError, match="empty grid"):
        choose(Oracle, [], records, valid, remove_seen=True)


def test_graph_beats_popularity_where_the_next_item_follows_from_the_last(records_of):
    rng = np.random.default_rng(0)
    follows = rng.permutation(np.arange(2, 102))
    rows = []
    for u in range(300):
        items = [int(rng.integers(2, 102))]
        for _ in range(6):
            items.append(int(follows[items[-1] - 2]) if rng.random() < 0.7 else int(rng.integers(2, 102)))
        rows.append({"user_index": u, "items": np.array(items[:-1], np.int32), "label": items[-1]})
    records, valid = records_of(rows), np.arange(128) >= 2
    train = records.latest(5)
    graph = ItemGraph(Transitions(train, 128, 1), GraphSettings())
    popular = Popularity(np.bincount(train.items, minlength=128))
    graph_recall = (rank_all(graph, records, valid, 1, remove_seen=False)[0] < 1).mean()
    popular_recall = (rank_all(popular, records, valid, 1, remove_seen=False)[0] < 1).mean()
    assert graph_recall > 0.55 and popular_recall < 0.1
