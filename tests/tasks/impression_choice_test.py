"""Parts of a log: surfaces, windows of time, and tasks on other parts that hold out the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.rated_world import RatedWorld
from recjax.data.sources import DataDir
from recjax.tasks.impressions import Impressions
from recjax.tasks.work import Work

WORLD = RatedWorld(rows=2000, users=50, items=30, domains=2)
TIMES = np.sort(WORLD.tables().interactions["timestamp"].to_numpy())
ADS, ORGANIC = "domain == site1", "domain != site1"


def work(**settings: Any) -> Work:
    return Impressions(data=DataDir(simulate=WORLD), labels={"click": "click"}, domain="domain", **settings).work()


def column(made: Work, name: str, split: str) -> np.ndarray:
    return made.raw[split][name].values


def test_a_window_and_a_rule_leave_the_rows_they_say() -> None:
    made = work(only=ORGANIC, window=(0.25, 0.5))
    times = np.concatenate([column(made, "time", split) for split in ("train", "valid", "test")])
    assert times.min() >= TIMES[500] and times.max() < TIMES[1000]
    assert made.facts["domains"] == ["site0"]
    rows = WORLD.tables().interactions
    at = rows["timestamp"].to_numpy()
    want = (at >= TIMES[500]) & (at < TIMES[1000]) & (rows["domain"].to_numpy() == "site0")
    assert len(times) == want.sum()
    train = column(made, "time", "train")
    assert made.facts["trained_times"] == [train.min(), train.max()]


def test_windows_that_meet_share_no_row() -> None:
    parts = [work(window=w) for w in ((0.0, 0.4), (0.4, 0.7), (0.7, 1.0))]
    times = [np.concatenate([column(p, "time", s) for s in ("train", "valid", "test")]) for p in parts]
    assert sum(map(len, times)) == 2000
    for before, after in zip(times, times[1:], strict=False):
        assert before.max() < after.min()


def test_tasks_on_other_training_rows_ask_the_same() -> None:
    """Ads alone, and ads merged with what another surface saw before the first cut."""
    alone = work(only=ADS, window=(0.5, 1.0), cuts=(0.7, 0.8))
    merged = work(held_out=ADS, window=(0.25, 1.0), cuts=(0.7, 0.8))
    for split in ("valid", "test"):
        assert alone.facts["rows_hash"][split] == merged.facts["rows_hash"][split]
        np.testing.assert_array_equal(column(alone, "user_index", split), column(merged, "user_index", split))
        assert set(np.asarray(merged.facts["domains"])[column(merged, "domain", split)]) == {"site1"}
    first = min(column(alone, "time", split).min() for split in ("valid", "test"))
    assert column(merged, "time", "train").max() < first
    assert len(column(merged, "time", "train")) > len(column(alone, "time", "train"))
    assert alone.facts["rows_hash"]["train"] != merged.facts["rows_hash"]["train"]


def test_windows_of_users_cut_every_history_in_order_of_time() -> None:
    early, late = (
        work(window=w, window_of="user", cuts=c) for w, c in (((0.0, 0.6), (0.4, 0.5)), ((0.6, 1.0), (0.8, 0.9)))
    )
    rows = WORLD.tables().interactions.sort(["user_id", "timestamp"], maintain_order=True)
    for user in set(column(early, "user_index", "train").tolist()):
        ends = [
            (made.raw[split]["time"].values[made.raw[split]["user_index"].values == user])
            for made in (early, late)
            for split in ("train", "valid", "test")
        ]
        ends = [times for times in ends if len(times)]
        for before, after in zip(ends, ends[1:], strict=False):
            assert before.max() <= after.min()
    total = sum(len(column(made, "time", split)) for made in (early, late) for split in ("train", "valid", "test"))
    assert total == rows.height
    share = sum(len(column(early, "time", split)) for split in ("train", "valid", "test")) / total
    assert abs(share - 0.6) < 0.02


def test_domains_that_are_named_keep_their_numbers_whatever_they_have() -> None:
    plain = work()
    assert plain.facts["domains"] == ["site0", "site1"]  # by size
    named = work(domains=("gone", "site1"))
    assert named.facts["domains"] == ["gone", "site1", "site0"]
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(column(named, "domain", split), 2 - column(plain, "domain", split))


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(ConfigError, match="window"):
        Impressions(window=(0.5, 0.5))
    with pytest.raises(ConfigError, match="cuts"):
        Impressions(window=(0.5, 1.0), cuts=(0.4, 0.8))
    with pytest.raises(ConfigError, match='split "random"'):
        Impressions(held_out=ADS, split="random")
    with pytest.raises(ConfigError, match="window_of"):
        Impressions(held_out=ADS, window_of="user")
    with pytest.raises(DataError, match="no row is left"):
        work(only="domain == nowhere")
