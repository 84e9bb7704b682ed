"""The interval agrees with a bootstrap written as a loop, with theory, and with itself."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.metrics import bootstrap
from recjax.metrics.bootstrap import interval, intervals, paired_difference


def test_equals_a_bootstrap_written_as_a_loop(monkeypatch):
    monkeypatch.setattr(bootstrap, "_CELLS", 40 * 7)
    values = np.random.default_rng(0).random((40, 2))
    found = intervals(values, samples=50, seed=3, level=0.9)
    rng, means = np.random.default_rng(3), []
    while len(means) < 50:
        for row in rng.integers(40, size=(min(7, 50 - len(means)), 40)):
            means.append(np.mean([values[i] for i in row], axis=0))
    for column, got in enumerate(found):
        sample = np.array(means)[:, column]
        assert got.mean == pytest.approx(values[:, column].mean())
        assert (got.low, got.high) == pytest.approx((np.quantile(sample, 0.05), np.quantile(sample, 0.95)))


def test_clusters_are_drawn_whole():
    """A bootstrap over clusters written as a loop; and alone in its cluster, each value is drawn as without any."""
    rng = np.random.default_rng(5)
    clusters, values = rng.integers(0, 9, 60) * 7, rng.random((60, 2))
    found = intervals(values, clusters=clusters, samples=300, seed=2)
    members = [values[clusters == name] for name in np.unique(clusters)]
    rng = np.random.default_rng(2)
    drawn = [np.concatenate([members[i] for i in row]) for row in rng.integers(9, size=(300, 9))]
    for column, got in enumerate(found):
        sample = [part[:, column].mean() for part in drawn]
        assert got.mean == pytest.approx(values[:, column].mean())
        assert (got.low, got.high) == pytest.approx(tuple(np.quantile(sample, [0.025, 0.975])))
    assert intervals(values, clusters=np.arange(60)[::-1], samples=20)[0].mean == pytest.approx(values[:, 0].mean())
    alone = intervals(values, clusters=np.arange(60), samples=50)
    for one, other in zip(alone, intervals(values, samples=50), strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_what_repeats_adds_no_certainty():
    values = np.random.default_rng(6).random((50, 1))
    once, often = interval(values[:, 0]), intervals(np.tile(values, (20, 1)), clusters=np.tile(np.arange(50), 20))[0]
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_width_is_that_of_the_normal_limit():
    values = (np.random.default_rng(1).random(5000) < 0.3).astype(np.float64)
    found = interval(values, samples=2000)
    expected = 1.96 * values.std() / np.sqrt(5000)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)
    assert found == interval(values, samples=2000)
    assert found != interval(values, samples=2000, seed=1)


def test_pairing_cancels_what_users_share():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 10, 400)
    ours, theirs = shared + 0.2 + rng.normal(0, 0.1, 400), shared + rng.normal(0, 0.1, 400)
    paired = paired_difference(ours, theirs)
    assert paired.excludes_zero and paired.low < 0.2 < paired.high
    assert paired.high - paired.low < (interval(ours).high - interval(ours).low) / 20
    same = paired_difference(ours, ours)
    assert (same.mean, same.low, same.high) == (0, 0, 0) and not same.excludes_zero


def test_coverage_of_the_true_mean_is_near_the_level():
    rng = np.random.default_rng(4)
    hits = 0
    for seed in range(200):
        found = interval(rng.exponential(1.0, 100), samples=1000, seed=seed)
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_no_users_is_not_a_number():
    assert np.isnan(interval(np.zeros(0)).mean)
