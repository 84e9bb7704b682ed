import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.examples import Examples, write_examples
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM, OOV
from recjax.export import facets_of
from recjax.tasks.cache import described
from recjax.tasks.next_item import NextItem
from recjax.tasks.work import Work, columns_of, examples_of


def random_tables(seed: int, *, times: bool = True, events: int = 300) -> Tables:
    rng = np.random.default_rng(seed)
    users = np.concatenate([rng.integers(0, 40, events - 1), [77]])  # user 77 has one event
    log = pl.DataFrame(
        {
            "user_id": users,
            "item_id": [f"i{k}" for k in np.minimum(rng.zipf(1.4, events), 60)],
            "timestamp": rng.integers(0, 90, events) * 10,
        }
    ).sort(["user_id", "timestamp"], maintain_order=True)
    log = log.with_columns(order=pl.int_range(pl.len()).over("user_id"))
    items = pl.DataFrame(
        {"item_id": [f"i{k}" for k in range(0, 60, 2)], "title": [f"Item {k}" for k in range(0, 60, 2)]}
    )
    return Tables(interactions=log if times else log.drop("timestamp"), items=items)


def users_of(task: NextItem, tables: Tables) -> list[list[tuple[str, int]]]:
    """(item, time) of each user, users in order of id."""
    users: dict[int, list[tuple[str, int]]] = {}
    for user, item, time in tables.interactions.select("user_id", "item_id", "timestamp").iter_rows():
        users.setdefault(user, []).append((item, time))
    return [events for _, events in sorted(users.items()) if len(events) >= task.min_events]


def cutoffs_by_hand(users: list[list[tuple[str, int]]]) -> list[int]:
    times = sorted(time for events in users for _, time in events)
    return [times[len(times) * share // 10] for share in (8, 9)]


def train_events_by_hand(task: NextItem, tables: Tables) -> list[list[tuple[str, int]]]:
    """Each user's training events."""
    users = users_of(task, tables)
    if task.split == "leave_one_out":
        return [events[:-2] if len(events) >= 3 else events for events in users]
    if task.split == "leave_last":
        return [events[: -task.held_out - 1] if len(events) >= task.held_out + 2 else events for events in users]
    valid_time, _ = cutoffs_by_hand(users)
    return [[event for event in events if event[1] < valid_time] for events in users]


def cut_by_hand(task: NextItem, tables: Tables) -> dict[str, list[dict[str, Any]]]:
    """The examples of each split with item ids instead of rows, in plain Python."""
    users, trained = users_of(task, tables), train_events_by_hand(task, tables)
    found: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    for index, (events, train) in enumerate(zip(users, trained, strict=True)):
        if task.split == "leave_one_out":
            targets = {"valid": len(events) - 2, "test": len(events) - 1} if len(events) >= 3 else {}
            ends = {"valid": len(events) - 1, "test": len(events)}
        elif task.split == "leave_last":
            first = len(events) - task.held_out
            targets = {"valid": first - 1, "test": first} if first >= 2 else {}
            ends = {"valid": first, "test": len(events)}
        else:
            later = sum(time < cutoffs_by_hand(users)[1] for _, time in events)
            targets = {"valid": len(train)} if len(train) < later else {}
            targets |= {"test": later} if later < len(events) else {}
            ends = {"valid": later, "test": len(events)}
        if len(train) >= 2:
            found["train"].append({"user_index": index, "events": train})
        for split, at in targets.items():
            if at >= 1:
                example = {"events": events[:at], "label": events[at], "train_events": len(train)}
                example["future"] = events[at : ends[split]]
                found[split].append({"user_index": index, **example})
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [{}, {"split": "global_time"}, {"min_events": 4}, {"catalogue": "items"}, {"split": "leave_last", "held_out": 4}],
)
def test_examples_agree_with_a_cut_by_hand(seed: int, settings: dict[str, Any]) -> None:
    task, tables = NextItem(**settings), random_tables(seed)
    work = task.work_on(tables)
    expected = cut_by_hand(task, tables)
    row = dict(zip(work.items["item_id"], work.items["row"], strict=True))
    for split, wanted in expected.items():
        if split != "train":
            known = [w for w in wanted if w["label"][0] in row]
            assert work.facts["counts"][split]["target_unknown"] == len(wanted) - len(known)
            wanted = known
        found = list(examples_of(work, split))
        assert len(found) == len(wanted) == work.facts["counts"][split]["examples"]
        for one, other in zip(found, wanted, strict=True):
            assert set(one) == {f.name for f in work.schemas[split]}
            assert one["user_index"] == other["user_index"]
            assert one["items"].tolist() == [row.get(i, OOV) for i, _ in other["events"]]
            assert one["times"].tolist() == [t for _, t in other["events"]]
            if split != "train":
                assert (one["label"], one["label_time"]) == (row[other["label"][0]], other["label"][1])
                assert one["train_events"] == other["train_events"]
                assert one["future"].tolist() == [row.get(i, OOV) for i, _ in other["future"]]
                assert one["future_times"].tolist() == [t for _, t in other["future"]]
                assert one["future_events"] == len(other["future"]) and one["future"][0] == one["label"]
                if task.split == "leave_last":
                    assert one["future_events"] == (task.held_out if split == "test" else 1)


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_the_vocabulary_counts_training_events_only(split: str) -> None:
    task, tables = NextItem(split=split), random_tables(0)
    work = task.work_on(tables)
    trained = [item for events in train_events_by_hand(task, tables) for item, _ in events]
    counts = dict(zip(work.items["item_id"], work.items["train_count"], strict=True))
    assert counts == {item: trained.count(item) for item in tables.interactions["item_id"]}
    assert work.items["row"].to_list() == list(range(FIRST_ITEM, FIRST_ITEM + len(counts)))
    assert work.items["train_count"].to_list() == sorted(counts.values(), reverse=True)
    assert work.vocab.decode(work.items["row"].to_numpy()) == work.items["item_id"].to_list()


def test_what_is_left_out_and_odd_is_counted() -> None:
    log = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 1, 2, 2, 3, 4, 4, 4],
            "item_id": [10, 11, 12, 11, 10, 11, 12, 11, 10, 99],
            "order": [0, 1, 2, 3, 0, 1, 0, 0, 1, 2],
        }
    )
    tables = Tables(interactions=log, items=pl.DataFrame({"item_id": [10, 11, 12, 13]}))
    counts = NextItem(catalogue="items").work_on(tables).facts["counts"]
    assert counts["train"] == {"examples": 2, "events": 2 + 2 + 1 + 1, "too_short": 2}
    assert counts["valid"]["examples"] == 2 and counts["valid"]["without_target"] == 2
    test = {"examples": 1, "without_target": 2, "without_history": 0, "target_unknown": 1, "target_seen_before": 1}
    assert counts["test"] == test
    assert counts["log"]["events_outside_catalogue"] == 1
    dropped = NextItem(min_events=3).work_on(tables).facts["counts"]["log"]
    assert (dropped["users_below_min_events"], dropped["events_of_those_users"], dropped["users"]) == (2, 3, 2)


def test_a_dense_core_without_repeats() -> None:
    """Every user and every item has five events of different kinds, and the manifest says what became of the rest."""
    tables = random_tables(3, events=1500)
    work = NextItem(repeats=False, k_core=5).work_on(tables)
    events = [[*example["items"], example["label"]] for example in examples_of(work, "test")]
    users, items = np.repeat(np.arange(len(events)), [*map(len, events)]), np.concatenate(events)
    pairs = np.stack([users, items])
    assert 200 < pairs.shape[1] < 1000 and np.unique(pairs, axis=1).shape == pairs.shape
    assert len(events) == len(work.users) and min(map(len, events)) >= 5
    assert np.bincount(items)[FIRST_ITEM:].min() >= 5
    said = [note for note in work.facts["notes"] if " of 1,500 events" in note]
    assert len(said) == 2 and "without repeats" in said[0] and "5-core" in said[1]
    first = tables.interactions.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    kept = first.filter(pl.col("user_id").is_in(work.users["user_id"].implode()))
    assert set(work.items["item_id"]) <= set(kept["item_id"])


def test_settings_that_came_later_rename_no_folder_until_they_are_changed() -> None:
    told = described(NextItem())
    assert "k_core" not in told and "repeats" not in told
    assert described(NextItem(k_core=5))["k_core"] == 5


def test_titles_and_items_never_seen_are_in_the_catalogue() -> None:
    work = NextItem(catalogue="items").work_on(random_tables(1))
    assert work.vocab.num_items == 30
    assert work.items["title"].to_list() == ["Item " + i[1:] for i in work.items["item_id"]]
    mixed = NextItem().work_on(random_tables(1)).items
    assert mixed.filter(pl.col("title").is_null()).height > 0  # sold, but not in the items table


def test_what_items_can_be_filtered_by_is_kept_as_words(tmp_path: Path) -> None:
    tables = random_tables(1)
    assert tables.items is not None
    years, genres = [1980 + k for k in range(30)], [None if k % 5 == 0 else ["a", "bc"[k % 2]] for k in range(30)]
    items = tables.items.with_columns(pl.Series("year", years), pl.Series("genres", genres), domain=pl.lit("film"))
    work = NextItem(facets=("year", "genres")).work_on(dataclasses.replace(tables, items=items))
    with write_examples(tmp_path / "x", facts=dict(work.facts), vocab=work.vocab, items=work.items, users=work.users):
        pass
    facets = facets_of(Examples.open(tmp_path / "x"))
    assert set(facets) == {"domain", "year", "genres"}
    for row in range(work.vocab.num_rows):
        name = work.vocab.decode([row])[0] if work.vocab.valid[row] else None
        at = None if name not in tables.items["item_id"] else tables.items["item_id"].to_list().index(name)
        expected = (None, None, None) if at is None else ("film", str(years[at]), genres[at])
        assert (facets["domain"][row], facets["year"][row], facets["genres"][row]) == expected
    with pytest.raises(DataError, match="no column price"):
        NextItem(facets=("price",)).work_on(tables)


def test_times_are_optional() -> None:
    work: Work = NextItem().work_on(random_tables(2, times=False))
    for split in ("train", "test"):
        names = {f.name for f in work.schemas[split]}
        assert not names & {"times", "label_time", "future_times"}
        assert set(next(iter(examples_of(work, split)))) == names


def test_examples_one_by_one_become_columns_again() -> None:
    work = NextItem().work_on(random_tables(3))
    found = list(examples_of(work, "test"))
    columns = columns_of(found, work.schemas["test"])
    for field in work.schemas["test"]:
        assert columns[field.name].values.dtype == np.dtype(field.dtype)
        for k, example in enumerate(found):
            np.testing.assert_array_equal(columns[field.name][k], example[field.name])


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "random"},
        {"catalogue": "all"},
        {"valid_fraction": 0.0},
        {"valid_fraction": 0.6, "test_fraction": 0.4},
        {"test_fraction": float("nan")},
        {"min_events": 0},
        {"held_out": 0},
        {"name": "a/b"},
        {"name": ".hidden"},
        {"facets": ("title",)},
    ],
)
def test_settings_that_make_no_task_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="NextItem"):
        NextItem(**settings)


def test_data_that_lacks_what_the_task_needs_is_told() -> None:
    tables = random_tables(0, times=False)
    with pytest.raises(DataError, match="needs times"):
        NextItem(split="global_time").work_on(tables)
    with pytest.raises(DataError, match="needs an items table"):
        NextItem(catalogue="items").work_on(dataclasses.replace(tables, items=None))
    single = tables.interactions.filter(pl.col("order") == 0)
    with pytest.raises(DataError, match="two events to train on"):
        NextItem().work_on(Tables(interactions=single))


def test_splits_can_be_given() -> None:
    tables = random_tables(1)
    times = tables.interactions["timestamp"]
    valid, test = cutoffs_by_hand(users_of(NextItem(), tables))
    said = (
        pl.when(times < valid).then(pl.lit("train")).when(times < test).then(pl.lit("valid")).otherwise(pl.lit("test"))
    )
    given = dataclasses.replace(tables, interactions=tables.interactions.with_columns(split=said))
    found, expected = NextItem(split="given").work_on(given), NextItem(split="global_time").work_on(tables)
    for split in found.schemas:
        for one, other in zip(examples_of(found, split), examples_of(expected, split), strict=True):
            assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in other.items()}
    with pytest.raises(DataError, match="needs a column split"):
        NextItem(split="given").work_on(tables)
