"""Flat records give back every user's history, cut and weighted as the plain loops do."""

from __future__ import annotations

import numpy as np
import pytest


def source_of(seed, users=7, v=20):
    rng = np.random.default_rng(seed)
    return [
        {
            "user_index": np.int64(10 + u),
            "items": rng.integers(2, v, int(rng.integers(0, 9))).astype(np.int32),
            "label": np.int32(rng.integers(2, v)),
            "train_events": np.int32(rng.integers(0, 9)),
        }
        for u in range(users)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_loops(seed, records_of):
    source = source_of(seed)
    records = records_of(source)
    order = np.array([5, 0, 3])
    for part, rows in ((records, source), (records.take(order), [source[i] for i in order])):
        assert len(part) == len(rows)
        padded, latest = part.padded(), part.latest(3)
        weights = part.weights(20, limit=4, decay=0.5).toarray()
        for u, row in enumerate(rows):
            items = row["items"].tolist()
            assert part.items[part.offsets[u] : part.offsets[u + 1]].tolist() == items
            assert latest.items[latest.offsets[u] : latest.offsets[u + 1]].tolist() == items[-3:]
            assert [r for r in padded[u].tolist() if r] == items
            expected = np.zeros(20)
            for age, item in enumerate(reversed(items[-4:])):
                expected[item] += 0.5**age
            np.testing.assert_allclose(weights[u], expected, rtol=1e-6)
            assert (part.label[u], part.user_index[u]) == (row["label"], row["user_index"])
            assert part.train_events[u] == row["train_events"]


def test_a_split_may_be_empty(records_of):
    assert len(records_of([])) == 0 and records_of([]).padded().shape == (0, 1)
