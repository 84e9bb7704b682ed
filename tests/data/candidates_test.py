"""Candidates are unseen, distinct, uniform, and a function of seed and user alone."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.data.candidates import below, draw_candidates, hashed, share

ROWS = slice(2, 62)


def users(n=300, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, n)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return rng.integers(1, 62, offsets[-1]).astype(np.int32), offsets, rng.integers(2, 62, n), rng.permutation(1000)[:n]


def test_unseen_distinct_and_never_the_target():
    seen, offsets, label, number = users()
    found = draw_candidates(seen, offsets, label, number, ROWS, 25, seed=3)
    for u in range(len(label)):
        mine = set(found[u].tolist())
        assert len(mine) == 25 and min(mine) >= 2 and max(mine) < 62
        assert not mine & {*seen[offsets[u] : offsets[u + 1]].tolist(), int(label[u])}


def test_all_that_is_left_where_there_are_too_few():
    seen, offsets, label, number = users()
    found = draw_candidates(seen, offsets, label, number, ROWS, 55, seed=3)
    for u in range(len(label)):
        unseen = set(range(2, 62)) - {*seen[offsets[u] : offsets[u + 1]].tolist(), int(label[u])}
        mine = found[u][found[u] > 0].tolist()
        assert len(mine) == len(set(mine)) == min(55, len(unseen)) and set(mine) <= unseen


def test_a_draw_does_not_depend_on_who_else_is_there():
    seen, offsets, label, number = users()
    whole = draw_candidates(seen, offsets, label, number, ROWS, 10, seed=3)
    half = offsets[150]
    part = draw_candidates(seen[half:], offsets[150:] - half, label[150:], number[150:], ROWS, 10, seed=3)
    np.testing.assert_array_equal(part, whole[150:])
    assert (draw_candidates(seen, offsets, label, number, ROWS, 10, seed=4) != whole).mean() > 0.9
    fewer = draw_candidates(seen, offsets, label, number, ROWS, 4, seed=3)
    np.testing.assert_array_equal(fewer, whole[:, :4])


def test_every_unseen_item_is_as_likely():
    n = 20_000
    found = draw_candidates(np.zeros(0, np.int32), np.zeros(n + 1, int), np.full(n, 2), np.arange(n), ROWS, 6, seed=0)
    counts = np.bincount(found.ravel(), minlength=62)[3:62]
    expected = n * 6 / 59
    assert ((counts - expected) ** 2 / expected).sum() < 59 + 4 * np.sqrt(2 * 59)


@pytest.mark.parametrize("bound", [1, 7, 1000])
def test_hashes_are_uniform(bound):
    drawn = below(bound, 5, np.arange(50_000), -1)
    assert drawn.min() == 0 and drawn.max() == bound - 1
    assert abs(drawn.mean() - (bound - 1) / 2) < 5 * bound / np.sqrt(12 * 50_000)
    assert abs(share(5, np.arange(50_000)).mean() - 0.5) < 0.01
    assert len(np.unique(hashed(1, np.arange(1000)[:, None], np.arange(100)))) == 100_000
