"""Popularity over time: against a transcription in words, no look ahead, ties, unseen items, whose events count."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import ConfigError, ExamplesError
from recjax.data import popularity
from recjax.data.examples import Examples
from recjax.data.popularity import DAY, WHOLE, Dynamics, decayed, log_of, percentile, windowed
from recjax.data.sources import DataDir
from recjax.tasks.cache import place_of
from recjax.tasks.next_item import NextItem

ROWS = 8
STEP = 100 / WHOLE  # how finely a percentile is kept
logs = st.lists(st.tuples(st.integers(2, ROWS - 1), st.integers(0, 9)), min_size=1, max_size=40)


def _percent(shares: np.ndarray) -> np.ndarray:
    return shares * STEP


def _by_words(scores: dict[int, float]) -> dict[int, float]:
    """100 rank / count of each, ranks from 1, equal scores sharing the mean of their ranks."""
    out = {}
    for item, score in scores.items():
        below = sum(other < score for other in scores.values())
        equal = sum(other == score for other in scores.values())
        out[item] = 100 * (below + (equal + 1) / 2) / len(scores)
    return out


@given(logs)
def test_both_horizons_are_what_the_paper_says(log: list[tuple[int, int]]) -> None:
    rows, period = (np.array(x) for x in zip(*log, strict=True))
    coarse, fine = decayed(rows, period, ROWS, decay=0.5), windowed(rows, period, ROWS, window=4)
    assert coarse.shape == (ROWS, period.max() + 1) and fine.shape == (ROWS, period.max() + 5)
    for table, score in (
        (coarse, lambda t, i: sum(0.5 ** (t - s) for r, s in log if r == i and s <= t)),
        (fine, lambda t, i: sum(1 for r, s in log if r == i and t - 4 < s <= t)),
    ):
        for t in range(table.shape[1]):
            seen = {r for r, s in log if s <= t}
            expected = _by_words({i: score(t, i) for i in seen})
            found = {i: p for i, p in enumerate(_percent(table[:, t])) if p}
            assert found.keys() == expected.keys()
            np.testing.assert_allclose(
                [found[i] for i in expected], list(expected.values()), atol=STEP if len(seen) else 0
            )


@given(logs, st.integers(0, 10), st.integers(2, ROWS - 1))
def test_what_happens_in_a_period_or_later_changes_nothing_before_it(
    log: list[tuple[int, int]], t: int, item: int
) -> None:
    rows, period = (np.array(x) for x in zip(*log, strict=True))
    others = np.where(period >= t, item, rows)
    for table in (lambda r: decayed(r, period, ROWS, decay=0.5), lambda r: windowed(r, period, ROWS, window=3)):
        np.testing.assert_array_equal(table(rows)[:, :t], table(others)[:, :t])


def test_an_item_that_nobody_touched_changes_no_other() -> None:
    rng = np.random.default_rng(0)
    rows, period = rng.integers(2, 100, 500), rng.integers(0, 30, 500)
    for few, many in (
        (decayed(rows, period, 100, decay=0.5), decayed(rows, period, 120, decay=0.5)),
        (windowed(rows, period, 100, window=4), windowed(rows, period, 120, window=4)),
    ):
        np.testing.assert_array_equal(few, many[:100])
        assert not many[100:].any() and not few[:2].any()


def test_equal_scores_share_a_rank_and_the_highest_has_all() -> None:
    np.testing.assert_allclose(percentile(np.array([5.0, 1.0, 1.0, 9.0])), [75, 37.5, 37.5, 100])


def test_the_least_popular_of_very_many_items_is_not_unseen() -> None:
    count = 200_000
    rows = np.concatenate([np.arange(count), np.arange(1, count)])
    table = decayed(rows, np.zeros(len(rows), np.int64), count, decay=0.5)
    assert table[0, 0] == 1 and table.min() == 1


def test_the_window_is_empty_at_last_and_then_all_seen_items_are_equal() -> None:
    fine = windowed(np.array([2, 2, 3]), np.array([0, 0, 5]), 4, window=4)
    np.testing.assert_allclose(_percent(fine[2:, -1]), [75, 75], atol=STEP)
    np.testing.assert_allclose(_percent(fine[2:, 5]), [50, 100], atol=STEP)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, prepare_here: Any) -> Examples:
    """Two users with real times: events on days 0, 3, 11, 12 and 1, 11, 25."""
    folder = tmp_path_factory.mktemp("log")
    day = [0, 3, 11, 12, 1, 11, 25]
    log = {
        "user_id": [1] * 4 + [2] * 3,
        "item_id": list("abcdbad"),
        "timestamp": [1_000_000_000 + DAY * d for d in day],
    }
    pl.DataFrame(log).write_parquet(folder / "interactions.parquet")
    task = NextItem(data=DataDir(path=str(folder)))
    prepare_here(task)
    return Examples.open(place_of(task).path)


def _days(rows: np.ndarray, times: np.ndarray, examples: Examples) -> list[tuple[Any, int]]:
    items = examples.vocab.decode(rows)
    return sorted(zip(items, ((times - 1_000_000_000) // DAY).tolist(), strict=True), key=lambda x: (x[1], x[0]))


def test_which_events_count(examples: Examples) -> None:
    """A user's last two events are held out; user 2 has one event left, which is no training example."""
    assert _days(*log_of(examples), examples) == [("a", 0), ("b", 3)]
    all_events = [("a", 0), ("b", 1), ("b", 3), ("a", 11), ("c", 11), ("d", 12), ("d", 25)]
    assert _days(*log_of(examples, "all"), examples) == all_events


def test_facts_say_when_periods_begin_and_how_long_they_are(examples: Examples) -> None:
    facts = Dynamics(coarse_days=10, fine_days=2, events="all")([examples])
    origin = datetime.datetime.fromtimestamp(int(facts["item/popularity_origin"]), datetime.UTC)
    assert (origin.hour, origin.minute, origin.second) == (0, 0, 0)
    assert int(facts["item/popularity_origin"]) <= 1_000_000_000 < int(facts["item/popularity_origin"]) + DAY
    assert (facts["item/coarse_seconds"], facts["item/fine_seconds"]) == (10 * DAY, 2 * DAY)
    assert facts["item/coarse"].shape == (examples.vocab.num_rows, 3)
    assert facts["item/fine"].shape == (examples.vocab.num_rows, 25 // 2 + 1 + 4)
    assert all(value.dtype in (np.uint16, np.int32) for value in facts.values())
    a, b, c, d = (int(examples.vocab.encode([i])[0]) for i in "abcd")
    # In the first ten days a once and b twice; in the second ones a, c and d once, b's two events count half each.
    np.testing.assert_allclose(_percent(facts["item/coarse"][[a, b, c, d], 0]), [50, 100, 0, 0], atol=STEP)
    np.testing.assert_allclose(_percent(facts["item/coarse"][[a, b, c, d], 1]), [100, 50, 50, 50], atol=STEP)


@pytest.mark.parametrize("bad", [{"coarse_days": 0}, {"fine_days": float("nan")}, {"window": 0}, {"decay": 1.5}])
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Dynamics(**bad)
    with pytest.raises(ConfigError, match="'train' or 'all'"):
        Dynamics(events="test")


def test_a_table_that_would_not_fit_in_memory_is_refused(examples: Examples, monkeypatch: Any) -> None:
    monkeypatch.setattr(popularity, "_MAX_BYTES", 2**20)
    with pytest.raises(ConfigError, match="would take .* GiB"):
        Dynamics(fine_days=1 / 1440)([examples])


def test_a_log_without_times_is_refused(tmp_path: Any, prepare_here: Any) -> None:
    log = {"user_id": [1] * 4, "item_id": list("abcd"), "position": range(4)}
    pl.DataFrame(log).write_parquet(tmp_path / "interactions.parquet")
    task = NextItem(data=DataDir(path=str(tmp_path)))
    prepare_here(task)
    with pytest.raises(ExamplesError, match="no times"):
        Dynamics()([Examples.open(place_of(task).path)])
