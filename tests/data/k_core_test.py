"""The k-core of a log against its definition, and the first events of pairs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recjax.data.k_core import first_of_pairs, k_core

logs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


def _counts(codes: np.ndarray) -> list[int]:
    return np.unique(codes, return_counts=True)[1].tolist()


@given(logs, st.integers(1, 4))
def test_all_that_is_left_has_k_events_and_nothing_more_could_be_kept(log: list[tuple[int, int]], k: int) -> None:
    users, items = np.array(log).T
    kept = k_core(users, items, k)
    assert all(count >= k for count in _counts(users[kept]) + _counts(items[kept]))
    alive = set(range(len(log)))  # taking away one event at a time, in another order, ends at the same
    while few := [
        e for e in sorted(alive, reverse=True) if min(sum(log[o][i] == log[e][i] for o in alive) for i in (0, 1)) < k
    ]:
        alive.remove(few[0])
    assert set(np.flatnonzero(kept).tolist()) == alive


def test_it_takes_several_rounds() -> None:
    """A chain: every item but the last has two events, and the last one's absence unravels it from the end."""
    users, items = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 2, 3])
    assert not k_core(users, items, 2).any() and k_core(users, items, 1).all()
    ring = np.array([0, 1, 1, 2, 2, 0])
    assert k_core(users, ring, 2).all()


@given(logs)
def test_the_first_of_each_pair(log: list[tuple[int, int]]) -> None:
    users, items = np.array(log).T
    assert first_of_pairs(users, items).tolist() == [pair not in log[:e] for e, pair in enumerate(log)]
