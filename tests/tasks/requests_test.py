"""Requests of three kinds out of one log: what each is told of, fair negatives, one imputation, groups of users."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.counters import Counter, History
from recjax.data.fields import MISSING, UNKNOWN, Categorical, Numeric, SameAs, SequenceOf, Words
from recjax.data.ranker_features import RankerFeatures
from recjax.data.requests_log import requests_of
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.tables import Tables
from recjax.data.user_clusters import user_clusters
from recjax.tasks.requests import Requests
from recjax.tasks.work import Work

FIELDS = (
    Categorical(columns=("item_id", "task", "user_id", "user_cluster")),
    SameAs(columns=("source_id",), of="item_id"),
    Words(columns=("query",), buckets=500, limit=24),
    Numeric(columns=("query.present", "source_id.present", "user_id.present"), scale="none", presence=False),
    Numeric(columns=("query_x_item_id.count", "previous_id_x_item_id.count"), scale="none", presence=False, clip=100.0),
    SequenceOf(columns=("history",), of="item_id", limit=3),
)
TASK = Requests(
    data=DataDir(simulate=World(num_events=1500, searches=True)),
    fields=FIELDS,
    counters=(Counter(columns=("query", "item_id")), Counter(columns=("previous_id", "item_id"))),
    histories=(History(limit=3), History(column="previous_id", limit=1, single=True)),
    negatives=2,
    held_negatives=5,
    clusters=4,
)


def tables(**more: Any) -> Tables:
    """Two users: the first searches twice, the second has two events at one time."""
    events = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 2, 2, 2],
            "item_id": [10, 11, 12, 10, 13, 11, 12],
            "timestamp": [5, 20, 30, 1, 7, 7, 40],
            "order": [0, 1, 2, 0, 1, 2, 3],
        }
    )
    items = pl.DataFrame({"item_id": [10, 11, 12, 13], "title": ["Red Hat", "Blue Hat", None, "Grey Coat"]})
    queries = pl.DataFrame({"query_id": [1, 2], "text": ["Red  hat ", "coat"]})
    return Tables(interactions=events, items=items, queries=queries, **more)


@pytest.fixture(scope="module")
def work() -> Work:
    return TASK.work()


def features_of(work: Work, folder: Path) -> RankerFeatures:
    for name, content in work.files.items():
        (folder / name).write_bytes(content)
    return RankerFeatures.load(folder)


def matrix(work: Work, name: str, split: str = "train") -> np.ndarray:
    found = work.raw[split][name]
    return found.values if found.offsets is None else found.values.reshape(len(found), -1)


def fields(work: Work, features: RankerFeatures, split: str = "train") -> dict[str, np.ndarray]:
    return features.encoder.batch({name: matrix(work, name, split) for name in features.encoder.widths})


def test_an_event_is_one_request_and_a_source_is_what_came_before() -> None:
    log = requests_of(tables(), kinds=("similar", "page"))
    assert log.height == 7 and log["timestamp"].is_sorted()
    before = {(1, 11): 10, (1, 12): 11, (2, 13): 10, (2, 12): 11}  # not 11 of user 2: at the same time as 13
    for row in log.to_dicts():
        pair = row["user_id"], row["item_id"]
        assert row["source_id"] == (before[pair] if row["task"] == "similar" else None)
        assert row["query"] is None and row["asker"] == row["apart"] == f"user {row['user_id']}"
    assert set(log["task"]) == {"similar", "page"}


def test_events_with_queries_are_searches_and_judgments_then_are_not() -> None:
    one = tables(relevance=pl.DataFrame({"query_id": [2], "item_id": [13], "label": [1]}))
    asked = one.interactions.with_columns(query_id=pl.Series([1, None, None, None, 2, None, None]))
    found = requests_of(dataclasses.replace(one, interactions=asked)).filter(task="search")
    assert found["query"].to_list() == ["red hat", "coat"] and found["timestamp"].to_list() == [5, 7]
    assert found["apart"].to_list() == ["query red hat", "query coat"]
    assert found["asker"].to_list() == ["user 1", "user 2"]


def test_a_judgment_has_the_time_of_its_users_event() -> None:
    judged = pl.DataFrame(
        {
            "query_id": [1, 1, 1, 2, 2, 2],
            "item_id": [11, 11, 12, 13, 10, 99],
            "label": [1, 1, 0, 1, 1, 1],
            "user_id": [1, 1, 1, None, 2, 1],
        }
    )
    found = requests_of(tables(relevance=judged)).filter(task="search").sort("item_id")
    assert found["item_id"].to_list() == [10, 11, 13]  # once a pair, relevant, of the log
    assert found["timestamp"].to_list()[:2] == [1, 20] and 1 <= found["timestamp"].to_list()[2] <= 40
    assert found["asker"].to_list() == ["user 2", "user 1", "query coat"]


def test_a_share_of_the_searches_is_asked_while_it_is_typed() -> None:
    log = World(num_events=3000, searches=True).tables()
    whole, typed = requests_of(log), requests_of(log, keys=0.6)
    assert whole.drop("query").equals(typed.drop("query"))  # what is meant, and what is no negative, stays
    asked = pl.DataFrame({"whole": whole["query"], "typed": typed["query"]}).drop_nulls("whole")
    assert whole["query"].null_count() == typed["query"].null_count() and len(asked) > 300
    assert all(one.startswith(part) and part for one, part in asked.iter_rows())
    cut = asked.filter(pl.col("whole") != pl.col("typed"))
    assert 0.5 < len(cut) / len(asked) < 0.7
    share = cut["typed"].str.len_chars() / cut["whole"].str.len_chars()
    assert 0.4 < share.mean() < 0.6 and (cut["typed"].str.len_chars() <= 3).any()
    with pytest.raises(ConfigError, match="keys"):
        Requests(keys=1.5)


def test_the_length_of_what_was_asked_is_kept_for_evaluation(work: Work) -> None:
    assert "length" not in work.raw["train"]
    task = dataclasses.replace(TASK, keys=0.5, lengths="query")
    found, log = task.work(), requests_of(TASK.data.load(), keys=0.5)
    lengths = log["query"].str.len_chars().fill_null(0).to_numpy()
    for split in ("train", "valid", "test"):
        rows = found.raw[split]
        np.testing.assert_array_equal(rows["length"].values, lengths[rows["request"].values])
    assert found.facts["rows_hash"] == work.facts["rows_hash"]  # the same questions, asked earlier


def test_without_times_or_queries_there_are_no_requests() -> None:
    one = tables()
    with pytest.raises(DataError, match="need times"):
        requests_of(dataclasses.replace(one, interactions=one.interactions.drop("timestamp")))
    with pytest.raises(DataError, match="needs queries"):
        requests_of(one)
    with pytest.raises(ConfigError):
        Requests(kinds=("browse",))


def test_every_kind_has_as_many_negatives_and_none_is_a_positive(work: Work) -> None:
    log = requests_of(TASK.data.load())
    had = set(zip(log["apart"], log["item_id"], strict=True))
    ids = np.array(work.vocab.ids)
    for split, negatives in (("train", 2), ("valid", 5), ("test", 5)):
        request, label = matrix(work, "request", split), matrix(work, "labels", split)[:, 0]
        domain = matrix(work, "domain", split)
        for kind in range(3):
            mine = domain == kind
            assert (label[mine] == 0).sum() == negatives * (label[mine] == 1).sum() > 0
        row = matrix(work, "items", split)[:, 0] - 2
        apart = log["apart"].gather(request).to_list()
        pairs = [(a, int(i)) in had for a, i in zip(apart, ids[row], strict=True)]
        np.testing.assert_array_equal(pairs, label == 1)
    assert work.facts["keep_negatives"] == 0.4 and set(work.facts["domains"]) == {"search", "similar", "page"}


def test_what_is_missing_is_filled_in_as_the_table_says(work: Work, tmp_path: Path) -> None:
    """Search has a null source, similar items ask with the name of theirs, a page has neither; bits tell all of it."""
    features = features_of(work, tmp_path)
    found, shape = fields(work, features), {s.name: s for s in features.encoder.shapes}
    kinds = [work.facts["domains"][d] for d in matrix(work, "domain")]
    log = requests_of(TASK.data.load())
    items = TASK.data.load().items
    assert items is not None
    title = dict(zip(items["item_id"], items["title"], strict=True))
    null_source, null_query = shape["source_id"].offset + MISSING, shape["query"].offset + MISSING
    assert null_source > 1 and MISSING != UNKNOWN  # neither padding nor unknown
    bits = {"search": (1, 0), "similar": (0, 1), "page": (0, 0)}
    for at, kind in enumerate(kinds):
        assert (found["field/query.present"][at], found["field/source_id.present"][at]) == bits[kind]
        assert (found["field/source_id"][at] == null_source) == (kind != "similar")
        assert (found["field/query"][at, 0] == null_query) == (kind == "page")
        assert found["field/user_id.present"][at] == 1
    similar = next(at for at, kind in enumerate(kinds) if kind == "similar")
    source = log["source_id"][int(matrix(work, "request")[similar])]
    typed = features.rows([{"task": "search", "query": title[source].upper()}])
    np.testing.assert_array_equal(found["field/query"][similar], typed["field/query"][0])


def test_counters_of_queries_fire_for_names(work: Work, tmp_path: Path) -> None:
    """Who asks next to an item asks with its name: what was had after that query is known to both."""
    features = features_of(work, tmp_path)
    log = requests_of(TASK.data.load()).filter(task="similar").head(100)
    items = TASK.data.load().items
    assert items is not None
    title = dict(zip(items["item_id"], items["title"], strict=True))
    asked = log.select("source_id", "item_id").to_dicts()
    named = features.rows([{"task": "similar", **row} for row in asked])
    typed = features.rows([{"query": f" {title[row['source_id']]}", "item_id": row["item_id"]} for row in asked])
    count = "field/query_x_item_id.count"
    np.testing.assert_array_equal(named[count], typed[count])
    assert (named[count] >= 1).all()


def test_a_chain_of_items_is_counted_in_earlier_events_alone(work: Work, tmp_path: Path) -> None:
    """What followed the item that the user had before, how often: for logged rows and drawn ones, and for a server."""
    log = requests_of(TASK.data.load()).with_row_index()
    user, item, time = (log[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    train = time < np.sort(time)[int(len(time) * 0.8)]

    def previous(who: int, when: int) -> int:
        mine = np.flatnonzero(train & (user == who) & (time < when))
        return int(item[mine[np.argsort(time[mine], kind="stable")[-1]]]) if len(mine) else -1

    before = np.array([previous(u, t) for u, t in zip(user.tolist(), time.tolist(), strict=True)])
    features = features_of(work, tmp_path)
    found = fields(work, features)["field/previous_id_x_item_id.count"]
    request, rows = matrix(work, "request"), matrix(work, "items").reshape(-1)
    ids = work.vocab.decode(rows)
    for at in range(0, len(rows), 7):
        one, asked = int(request[at]), int(ids[at])
        followed = train & (before == before[one]) & (item == asked) & (time < time[one])
        assert found[at] == (followed.sum() if before[one] >= 0 else 0), at
    assert found.max() > 1
    end = int(time[train].max()) + 1
    for who in log.filter(pl.col("user_id").is_not_null() & pl.Series(train))["user_id"].unique().sort()[:20].to_list():
        last = previous(who, end)
        asked = int(item[train & (before == last)][0]) if (train & (before == last)).any() else int(item[0])
        [said] = features.rows([{"user_id": who, "item_id": asked}])["field/previous_id_x_item_id.count"]
        assert said == (train & (before == last) & (item == asked)).sum()


def test_what_happens_later_changes_no_training_row(tmp_path: Path) -> None:
    """Groups, counters and histories of the rows before the cut are the same whatever comes after it."""
    whole = TASK.data.load()
    log = whole.interactions.sort("timestamp", maintain_order=True)
    cut = int(np.sort(log["timestamp"].to_numpy())[int(log.height * 0.8)])
    rng, late = np.random.default_rng(0), (log["timestamp"] >= cut).to_numpy()
    items = log["item_id"].to_numpy().copy()
    items[late] = rng.permutation(items[late])
    changed = log.with_columns(item_id=pl.Series(items)).sort(["user_id", "order"])
    task = dataclasses.replace(TASK, negatives=0, held_negatives=None)
    found = [task.work_on(dataclasses.replace(whole, interactions=frame)) for frame in (whole.interactions, changed)]
    for name in ("codes", "numbers", "labels", "time"):
        np.testing.assert_array_equal(matrix(found[0], name), matrix(found[1], name), err_msg=name)


def test_users_who_have_the_same_things_are_one_group() -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 12)
    item = rng.integers(0, 20, len(user)) + 20 * (user % 3)
    group = user_clusters(user, item, users=62, items=60, clusters=3)
    assert group[60:].tolist() == [-1, -1]
    assert len({(int(u % 3), int(g)) for u, g in zip(range(60), group[:60], strict=True)}) == 3
    np.testing.assert_array_equal(group, user_clusters(user, item, users=62, items=60, clusters=3))
    assert user_clusters(user[:0], item[:0], users=3, items=60, clusters=3).tolist() == [-1] * 3


def test_a_stranger_is_in_the_group_of_strangers(work: Work, tmp_path: Path) -> None:
    features = features_of(work, tmp_path)
    found = features.rows([{"user_id": 10**9}, {}, {"user_cluster": "0"}])["field/user_cluster"]
    assert len(set(found.tolist())) == 1
    known = fields(work, features)["field/user_cluster"]
    assert len(np.unique(known)) == 4
