"""What was known before a row: equal to looking at every pair of rows, and blind to what comes later."""

from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.counters import Counter, History, counts_before, history_before


def events(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, times (many at the same second) and amounts."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, n), rng.integers(0, 80, n), rng.integers(0, 3, (n, 2)).astype(np.float64)


@pytest.mark.parametrize("window", [0, 1, 15])
@pytest.mark.parametrize("delay", [0, 4])
def test_counts_are_those_of_every_pair_of_rows(window: int, delay: int) -> None:
    for seed in range(5):
        keys, times, amounts = events(seed)
        asked_keys, asked_times, _ = events(seed + 100, 200)
        found = counts_before((keys, times), amounts, (asked_keys, asked_times), window=window, delay=delay)
        for key, time, row in zip(asked_keys, asked_times, found, strict=True):
            mine = (keys == key) & (times < time - delay)
            if window:
                mine &= times >= time - window
            np.testing.assert_array_equal(row, amounts[mine].sum(0))


@pytest.mark.parametrize("limit", [1, 4, 1000])
def test_histories_are_those_of_every_pair_of_rows(limit: int) -> None:
    for seed in range(5):
        keys, times, _ = events(seed)
        asked_keys, asked_times, _ = events(seed + 100, 200)
        begin, length, order = history_before((keys, times), (asked_keys, asked_times), limit)
        for key, time, first, count in zip(asked_keys, asked_times, begin, length, strict=True):
            mine = np.flatnonzero((keys == key) & (times < time))
            mine = mine[np.argsort(times[mine], kind="stable")]
            assert order[first : first + count].tolist() == mine[-limit:].tolist()


def test_what_happens_later_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        keys, times, amounts = events(seed)
        now = 40
        early = times < now
        asked = np.arange(9), np.full(9, now)
        before = counts_before((keys, times), amounts, asked)
        history = history_before((keys, times), asked, 5)
        changed = keys.copy(), times.copy(), amounts.copy()
        later = np.flatnonzero(~early)
        changed[0][later] = rng.permutation(changed[0][later])
        changed[1][later] = rng.integers(now, 500, len(later))
        changed[2][later] = 99
        np.testing.assert_array_equal(counts_before(changed[:2], changed[2], asked), before)
        begin, length, order = history_before(changed[:2], asked, 5)
        for k in range(9):
            ours, theirs = order[begin[k] :][: length[k]], history[2][history[0][k] :][: history[1][k]]
            assert ours.tolist() == theirs.tolist()


def test_without_events_nothing_was_known() -> None:
    nothing = np.empty(0, np.int64)
    asked = np.array([1, 2]), np.array([3, 4])
    assert counts_before((nothing, nothing), np.empty((0, 1)), asked).tolist() == [[0], [0]]
    assert history_before((nothing, nothing), asked, 3)[1].tolist() == [0, 0]


@pytest.mark.parametrize("settings", [{"columns": ()}, {"columns": "x", "days": -1}, {"columns": "x", "prior": 0}])
def test_counters_refuse_what_counts_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Counter(**settings)


def test_names_say_what_is_counted() -> None:
    assert Counter(columns="item_id").name == "item_id"
    assert Counter(columns=("user_id", "genre"), days=7).name == "user_id_x_genre.7d"
    with pytest.raises(ConfigError):
        History(limit=0)
