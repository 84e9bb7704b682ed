"""Every metric against its definition written out user by user."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recjax.index.exact import MISS
from recjax.metrics.topk import Coverage, Mean, merge, per_user, topk_state, values

KS = (1, 5, 10)


def ranks_of(rng, n):
    ranks = rng.integers(0, 30, n).astype(np.int32)
    ranks[rng.random(n) < 0.05] = MISS
    return ranks


@pytest.mark.parametrize("seed", range(100))
def test_equals_the_definitions(seed):
    rng = np.random.default_rng(seed)
    ranks = ranks_of(rng, int(rng.integers(1, 40)))
    weight = (rng.random(len(ranks)) < 0.8).astype(np.float32)
    counted = [int(r) for r, w in zip(ranks, weight, strict=True) if w]
    found = values(topk_state(ranks, KS, weight))
    for k in KS:
        # By the sorted list: the target sits at place rank of a list of k, if it is in it at all.
        gains = [[1.0 if place == rank else 0.0 for place in range(k)] for rank in counted]
        ideal = 1.0 / math.log2(2)
        expected = {
            f"recall@{k}": [sum(g) for g in gains],
            f"ndcg@{k}": [sum(x / math.log2(place + 2) for place, x in enumerate(g)) / ideal for g in gains],
            f"mrr@{k}": [next((1.0 / (place + 1) for place, x in enumerate(g) if x), 0.0) for g in gains],
        }
        for name, per in expected.items():
            want = sum(per) / len(per) if per else float("nan")
            assert found[name] == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_parts_merge_to_the_whole_exactly():
    rng = np.random.default_rng(0)
    ranks = ranks_of(rng, 97)
    whole = topk_state(ranks, KS)
    merged = {}
    for start, stop in ((0, 3), (3, 3), (3, 60), (60, 97)):
        size = stop - start
        padded = np.concatenate([ranks[start:stop], np.zeros(4, np.int32)])
        weight = np.concatenate([np.ones(size, np.float32), np.zeros(4, np.float32)])
        merged = merge(merged, topk_state(padded, KS, weight))
    for name, mean in whole.items():
        assert merged[name].weight == mean.weight == 97
        assert merged[name].total == pytest.approx(mean.total, rel=1e-14)
    assert math.isnan(Mean().value)


def test_per_user_values_average_to_the_metric():
    ranks = ranks_of(np.random.default_rng(1), 50)
    for name, value in per_user(ranks, KS).items():
        assert value.mean() == pytest.approx(topk_state(ranks, KS)[name].value)


@pytest.mark.parametrize("seed", range(20))
def test_coverage_counts_distinct_items(seed):
    rng = np.random.default_rng(seed)
    valid = np.arange(40) >= 2
    valid[35:] = False
    rows = np.stack([rng.permutation(np.arange(2, 35))[:10] for _ in range(6)]).astype(np.int32)
    rows[0, 7:] = 0
    weight = np.array([1, 1, 0, 1, 0, 1], np.float32)
    one, other = Coverage(40, (3, 10)), Coverage(40, (3, 10))
    one.add(rows[:2], weight[:2])
    other.add(rows[2:], weight[2:])
    one.merge(other)
    for k in (3, 10):
        distinct = {int(r) for row, w in zip(rows, weight, strict=True) if w for r in row[:k]} - {0}
        assert one.values(valid)[f"coverage@{k}"] == len(distinct) / 33
    with pytest.raises(ValueError, match="needs 10"):
        one.add(rows[:, :5])
