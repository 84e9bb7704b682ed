"""Gains against sizes of domains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from recjax.domain_gain import gain_table, rank_correlation


def test_the_correlation_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        x, y = draw.integers(0, 6, 12), draw.normal(size=12)
        want = float(np.asarray(stats.spearmanr(x, y))[0])
        assert abs(rank_correlation(x.tolist(), y.tolist()) - want) < 1e-12
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_an_arm_that_helps_small_domains_most_has_a_correlation_of_minus_one() -> None:
    def arm(gains: dict[str, float]) -> dict[str, Any]:
        return {"hard": {"domains": {title: {"difference": {"auc": {"mean": gain}}} for title, gain in gains.items()}}}

    gains = {"big (1,200 rows)": 0.001, "middle (300 rows)": 0.002, "small (40 rows)": 0.03}
    first = {"hard": {"domains": {title: {} for title in gains}}}
    table = gain_table({"arms": {"first": first, "second": arm(gains)}})
    assert table.header == ["", *gains, "correlation"]
    assert table.rows == [["second", "+.0010", "+.0020", "+.0300", "-1.0000"]]
    assert not gain_table({"arms": {"first": first, "second": arm(dict(list(gains.items())[:2]))}}).rows
