"""Codes spread over the last level: unique, at the least cost, and nobody moves without need."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import DataError
from recjax.data.spread import spread

SIZE = 4


def nearest(left: np.ndarray, book: np.ndarray) -> np.ndarray:
    return ((left[:, None] - book[None]) ** 2).sum(-1).argmin(1)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 1000), st.integers(0, 2**9))
def test_it_is_the_cheapest_way_to_be_unique(prefix: list[int], seed: int, kept: int) -> None:
    """Against every assignment there is; with some items that keep their codes, whichever they are."""
    if max(np.bincount(prefix)) > SIZE:
        prefix = [i % 3 for i in range(len(prefix))]
    rng = np.random.default_rng(seed)
    left, book = rng.normal(size=(len(prefix), 2)), rng.normal(size=(SIZE, 2))
    content = np.stack([prefix, nearest(left, book)], axis=1)
    fixed = np.asarray([bool(kept >> i & 1) for i in range(len(prefix))])
    seen: set[tuple[int, int]] = set()
    for item in np.flatnonzero(fixed):  # items that keep their codes do not collide with each other
        fixed[item] = tuple(content[item]) not in seen
        seen.add(tuple(content[item]))
    got = spread(content, left, book, fixed=fixed)
    assert len(np.unique(got, axis=0)) == len(got) and got.dtype == np.int32
    np.testing.assert_array_equal(got[:, 0], prefix)
    np.testing.assert_array_equal(got[fixed], content[fixed])
    cost = ((left - book[got[:, 1]]) ** 2).sum(-1)
    for group in set(prefix):
        members = np.flatnonzero(np.asarray(prefix) == group)
        if len(np.unique(content[members, 1])) == len(members):
            np.testing.assert_array_equal(got[members], content[members])
        moving = [m for m in members if not fixed[m]]
        free = sorted(set(range(SIZE)) - {int(content[m, 1]) for m in members if fixed[m]})
        ways = itertools.permutations(free, len(moving))
        best = min(sum(((left[m] - book[c]) ** 2).sum() for m, c in zip(moving, way, strict=True)) for way in ways)
        assert cost[moving].sum() == pytest.approx(best)


def test_too_many_items_of_one_prefix_say_what_to_do() -> None:
    content, left, book = np.zeros((SIZE + 1, 2), int), np.zeros((SIZE + 1, 2)), np.zeros((SIZE, 2))
    with pytest.raises(DataError, match=r"5 items share the codes \[0\]") as error:
        spread(content, left, book)
    assert "collisions above 0" in error.value.mend
    assert sorted(spread(content[1:], left[1:], book)[:, 1].tolist()) == [0, 1, 2, 3]
