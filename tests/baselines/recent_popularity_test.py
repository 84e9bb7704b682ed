"""Popularity of the last days against a count over all events, one user at a time."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.baselines.recent_popularity import DAY, RecentPopularity
from recjax.baselines.records import Records
from recjax.core.errors import ConfigError

V = 30


def log(seed, users, *, more=0):
    """The first of `users` users; `more` events later than in the log without it."""
    items, times, offsets, label, label_time = [], [], [0], [], []
    for user in users:
        rng = np.random.default_rng([seed, user])
        n = int(rng.integers(3, 9))
        when = np.sort(rng.integers(0, 40 * DAY, n + 4))
        rows = rng.integers(2, V, n + 4)
        items.append(rows[: n + more])
        times.append(when[: n + more])
        label.append(rows[n + more])
        label_time.append(when[n + more])
        offsets.append(offsets[-1] + n + more)
    return Records(
        items=np.concatenate(items).astype(np.int32),
        offsets=np.array(offsets),
        user_index=np.array(users),
        label=np.array(label, np.int32),
        train_events=np.diff(offsets).astype(np.int32),
        times=np.concatenate(times),
        label_time=np.array(label_time),
    )


TRAIN, VALID, TEST = log(0, range(40)), log(0, range(5, 30), more=1), log(0, range(5, 25), more=2)


def known():
    """All events by user, from the longest record."""
    for user in range(40):
        part = next(r for r in (TEST, VALID, TRAIN) if user in r.user_index)
        at = int(np.flatnonzero(part.user_index == user)[0])
        span = slice(part.offsets[at], part.offsets[at + 1])
        yield from zip(part.times[span].tolist(), part.items[span].tolist(), strict=True)


def expected(asked):
    out = np.zeros((len(asked), V))
    for at, t in enumerate(asked):
        for when, row in known():
            out[at, row] += t - 7 * DAY <= when < t
    return out


def test_at_the_time_of_the_target():
    scorer = RecentPopularity([TRAIN, VALID, TEST], V, target_time=True)
    np.testing.assert_array_equal(scorer.scores(TEST), expected(TEST.label_time))
    part = TEST.take(np.array([7, 3]))
    np.testing.assert_array_equal(scorer.scores(part), scorer.scores(TEST)[[7, 3]])


def test_at_the_users_last_event_or_at_the_start_of_a_period():
    asked = [TEST.times[stop - 1] + 1 for stop in TEST.offsets[1:]]
    np.testing.assert_array_equal(
        RecentPopularity([TRAIN, VALID, TEST], V, target_time=False).scores(TEST), expected(asked)
    )
    scorer = RecentPopularity([TRAIN, VALID, TEST], V, target_time=False, now=20 * DAY)
    np.testing.assert_array_equal(scorer.scores(TEST), expected([20 * DAY] * len(TEST)))


def test_nothing_from_the_time_of_the_question_on_counts():
    scorer = RecentPopularity([TRAIN, VALID, TEST], V, target_time=True)
    before = scorer.scores(TEST)
    cut = [int(t) for t in TEST.label_time]
    for at in (0, 11):
        later = []
        for part in (TRAIN, VALID, TEST):
            items = np.where(part.times >= cut[at], 2, part.items).astype(np.int32)
            later.append(Records(**{**part.__dict__, "items": items}))
        np.testing.assert_array_equal(RecentPopularity(later, V, target_time=True).scores(TEST)[at], before[at])


def test_a_log_without_times_is_refused():
    with pytest.raises(ConfigError, match="needs times"):
        RecentPopularity([Records(**{**TRAIN.__dict__, "times": None})], V, target_time=False)
