"""Buckets and percentiles against their definition, item by item."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.metrics.buckets import ITEM_BUCKETS, item_buckets, popularity_percentile, user_buckets


@pytest.mark.parametrize("seed", range(100))
def test_items_follow_the_stated_rule(seed):
    rng = np.random.default_rng(seed)
    v = int(rng.integers(5, 60))
    valid = np.arange(v) >= 2
    valid[v - 1 :] = False
    count = np.floor(rng.pareto(1.0, v) * 3).astype(np.float32)
    count[0] = 99
    found = item_buckets(count, valid)
    total, held = count[valid].sum(), 0.0
    for row in sorted(np.flatnonzero(valid), key=lambda r: (-count[r], r)):
        expected = "unseen" if count[row] == 0 else "head" if held < total / 3 else "torso"
        if count[row] and held >= 2 * total / 3:
            expected = "tail"
        assert ITEM_BUCKETS[found[row]] == expected
        held += count[row]
    assert (found[~valid] == -1).all()


@pytest.mark.parametrize("seed", range(20))
def test_percentile_is_the_share_below(seed):
    rng = np.random.default_rng(seed)
    valid = np.arange(30) >= 2
    count = rng.integers(0, 6, 30).astype(np.float32)
    found = popularity_percentile(count, valid)
    for row in range(2, 30):
        below = sum(count[o] < count[row] for o in range(2, 30))
        equal = sum(count[o] == count[row] for o in range(2, 30))
        assert found[row] == pytest.approx((below + equal / 2) / 28)
    assert found[valid].mean() == pytest.approx(0.5)
    assert (found[:2] == 0).all()


def test_cold_users_have_at_most_the_threshold():
    assert user_buckets(np.array([0, 5, 6]), 5).tolist() == [0, 0, 1]
