"""Data that is odd but right: it is used, the result is the same as of tidy data, and what is left out is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recjax.data.examples import Examples
from recjax.data.sources import DataDir
from recjax.tasks.cache import place_of
from recjax.tasks.next_item import NextItem

T = 1_700_000_000
Prepare = Callable[..., Examples]


def log() -> pl.DataFrame:
    """40 users with 6 to 11 events among 60 items, oldest first."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), rng.integers(6, 12, 40))
    items = np.concatenate([np.arange(60), rng.integers(0, 60, len(users) - 60)])
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": T + 60 * np.arange(len(users))})


@pytest.fixture
def prepare(prepare_here: Callable[..., None], tmp_path: Path) -> Prepare:
    def prepare(interactions: pl.DataFrame, name: str, items: pl.DataFrame | None = None, **settings: str) -> Examples:
        folder = tmp_path / name
        folder.mkdir()
        interactions.write_parquet(folder / "interactions.parquet")
        if items is not None:
            items.write_parquet(folder / "items.parquet")
        task = NextItem(data=DataDir(path=str(folder)), **settings)
        prepare_here(task, tmp_path / "cache")
        return Examples.open(place_of(task, tmp_path / "cache").path)

    return prepare


def same(a: Examples, b: Examples) -> None:
    assert a.path != b.path and a.vocab == b.vocab and a.user_ids() == b.user_ids()
    for split in a.splits:
        one, two = a.source(split), b.source(split)
        assert len(one) == len(two) > 0
        for i in range(len(one)):
            assert one[i].keys() == two[i].keys()
            for name in one[i]:
                np.testing.assert_array_equal(one[i][name], two[i][name])


def test_unsorted_events_are_sorted(prepare: Prepare) -> None:
    shuffled = log().sample(fraction=1, shuffle=True, seed=1)
    assert not shuffled["timestamp"].is_sorted()
    same(prepare(shuffled, "shuffled"), prepare(log(), "sorted"))


def test_equal_times_keep_the_order_of_the_file_and_are_counted(prepare: Prepare) -> None:
    """Four events a second; in one file the last second comes first, but each second keeps its order."""
    tied = log().with_columns(timestamp=T + pl.int_range(pl.len()) // 4)
    found = prepare(tied.sort("timestamp", descending=True, maintain_order=True), "tied")
    same(found, prepare(tied, "in order"))
    count = tied.group_by("user_id", "timestamp").len().filter(pl.col("len") > 1)["len"].sum()
    assert any(
        f"{count:,} of {len(tied):,} events" in note and "file order" in note for note in found.manifest["notes"]
    )
    assert "file order" in found.manifest["tie_rule"]


def test_users_of_one_event_are_left_out_and_counted(prepare: Prepare) -> None:
    extra = pl.DataFrame({"user_id": [100, 101, 102], "item_id": [1, 2, 3], "timestamp": [T, T, T]})
    plain, found = prepare(log(), "plain"), prepare(pl.concat([log(), extra]), "extra")
    counts = found.manifest["counts"]
    assert counts["log"]["users"] == 43 and counts["train"]["too_short"] == 3
    assert counts["test"]["without_target"] == counts["valid"]["without_target"] == 3
    for split in found.splits:
        assert len(found.source(split)) == len(plain.source(split)) == 40
    # Their events still count for popularity, which orders the rows.
    assert found.item_count.sum() == plain.item_count.sum() + 3


def test_targets_outside_the_catalogue_are_left_out_and_counted(prepare: Prepare) -> None:
    last = log().with_row_index().group_by("user_id").last()["index"]
    with_new = (
        log()
        .with_row_index()
        .with_columns(item_id=pl.when(pl.col("index").is_in(last.head(3).implode())).then(900).otherwise("item_id"))
    )
    items = pl.DataFrame({"item_id": range(60)})
    found = prepare(with_new.drop("index"), "outside", items, catalogue="items")
    counts = found.manifest["counts"]
    assert counts["test"]["target_unknown"] == 3 and counts["log"]["events_outside_catalogue"] == 3
    assert len(found.source("test")) == counts["test"]["examples"] == 37
    assert found.vocab.num_items == 60
