"""Rows with labels: splits, negatives, what was known before a row, and one code for training and serving."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.counters import Counter, History
from recjax.data.examples import Examples
from recjax.data.fields import Bucketed, CatalogueItem, Categorical, Cross, MultiValued, Numeric, SequenceOf
from recjax.data.impression_log import SPLITS, ImpressionLog
from recjax.data.ranker_features import RankerFeatures
from recjax.data.rated_world import RatedWorld
from recjax.data.shards import MemorySource
from recjax.data.sources import DataDir
from recjax.prepare import prepare
from recjax.tasks import seqio_bridge
from recjax.tasks.impressions import Impressions, Rule
from recjax.tasks.mixtures import Mixture
from recjax.tasks.work import Work, columns_of, examples_of

FIELDS = (
    Categorical(columns=("user_id", "item_id", "device", "genre")),
    MultiValued(columns=("genres",)),
    Numeric(columns=("price", "age")),
    Bucketed(columns=("price",)),
    Cross(columns=("device", "genre"), buckets=50),
    SequenceOf(columns=("history",), of="item_id", limit=4),
    Numeric(columns=("item_id.count", "item_id.click", "user_id_x_genre.2d.click"), log=True),
)
COUNTERS = (Counter(columns="item_id"), Counter(columns=("user_id", "genre"), days=2))
WORLD = RatedWorld(rows=1500, users=40, items=30)


def impressions(**settings: Any) -> Impressions:
    told = {"data": DataDir(simulate=WORLD), "fields": FIELDS, "labels": {"click": "click", "like": "rating >= 4"}}
    history = History(limit=4, head="click")
    return Impressions(**{**told, "counters": COUNTERS, "histories": (history,), "domain": "domain", **settings})


def log_of(**columns: Any) -> ImpressionLog:
    return ImpressionLog(rows=pl.DataFrame(columns))


def column(work: Work, name: str, split: str = "train") -> np.ndarray:
    """A field of the records of a split, lists as rows of a matrix."""
    found = work.raw[split][name]
    return found.values if found.offsets is None else found.values.reshape(len(found), -1)


@pytest.fixture(scope="module")
def work() -> Work:
    return impressions().work()


@pytest.mark.tensorflow
def test_seqio_numpy_and_prepare_give_the_same_examples(work: Work, tmp_path: Path) -> None:
    """Preparing skips seqio, because there is no step to take; it must not matter."""
    task = seqio_bridge.seqio_task(work)
    prepared = Examples.open(prepare(Mixture(tasks=(impressions(),)), tmp_path)[0])
    for split, schema in work.schemas.items():
        plain = columns_of(list(examples_of(work, split)), schema)
        parts, source = list(seqio_bridge.materialise(task, split)), prepared.source(split)
        assert isinstance(source, MemorySource)
        for field in schema:
            values = np.concatenate([p[field.name].values for p in parts])
            assert values.dtype == source.columns[field.name].values.dtype == np.dtype(field.dtype)
            np.testing.assert_array_equal(values, plain[field.name].values)
            np.testing.assert_array_equal(source.columns[field.name].values, plain[field.name].values)


def test_a_logged_request_gives_the_bytes_of_its_training_row(tmp_path: Path) -> None:
    """What a server logs with a request (the columns it was asked with) encodes to what was trained on."""
    task = impressions(counters=(), histories=(), fields=FIELDS[:5], split="time")
    work, tables = task.work(), WORLD.tables()
    for name, content in work.files.items():
        (tmp_path / name).write_bytes(content)
    features = RankerFeatures.load(tmp_path)
    logged = tables.interactions.sort("timestamp", maintain_order=True).head(1000)
    names = list(features.encoder.widths)
    stored = {name: column(work, name)[:1000] for name in names}
    trained = features.encoder.batch(stored)
    requests = [json.loads(json.dumps(row)) for row in logged.select("user_id", "item_id", "device").to_dicts()]
    for k, request in enumerate(requests):
        for name, values in features.rows([request]).items():
            assert values[0].tobytes() == trained[name][k].tobytes(), (k, name)


def test_what_happens_later_changes_no_feature() -> None:
    """The records before a time are the same whatever is logged from then on, but for what is fitted."""
    rows = WORLD.tables().interactions.sort("timestamp").drop("order")
    tables, cut = WORLD.tables(), 1000
    assert tables.items is not None and tables.users is not None
    now = rows["timestamp"][cut]
    rng = np.random.default_rng(0)
    early, later = rows.filter(pl.col("timestamp") < now), rows.filter(pl.col("timestamp") >= now)
    shuffled = later.with_columns(
        later["item_id"].gather(rng.permutation(later.height)),
        later["user_id"].gather(rng.permutation(later.height)),
        click=1 - later["click"],
    )
    sides = {"items": tables.items, "users": tables.users}
    found = []
    for rest in (later, shuffled):
        frame = pl.concat([early, rest]).with_columns(split=pl.Series(["train"] * cut + ["valid", "test"] * 250))
        task = impressions(split="given", events="all")
        work = task.work_on(ImpressionLog(rows=frame, sides=sides))
        found.append({name: column(work, name) for name in ("codes", "numbers", "labels", "time")})
    for name, values in found[0].items():
        assert len(values) == cut
        np.testing.assert_array_equal(values, found[1][name], err_msg=name)


def test_a_request_after_the_log_knows_what_a_row_after_it_would(tmp_path: Path) -> None:
    """Counters and histories that a request does not bring are those of the end of the log, to the byte."""
    tables = WORLD.tables()
    assert tables.items is not None and tables.users is not None
    rows = tables.interactions.sort("timestamp").drop("order")
    rng = np.random.default_rng(1)
    asked = rows.sample(60, seed=0).with_columns(
        user_id=pl.Series(rng.integers(1, 45, 60)),  # some were never seen
        item_id=pl.Series(rng.integers(1, 35, 60)),
        timestamp=pl.lit(int(rows["timestamp"].to_numpy()[-1]) + 1, pl.Int64),
    )
    split = pl.Series(["train"] * rows.height + ["valid"] * 5 + ["test"] * 55)
    log = ImpressionLog(
        rows=pl.concat([rows, asked]).with_columns(split=split),
        sides={"items": tables.items, "users": tables.users},
    )
    late = Counter(columns=("user_id", "genre"), days=2, delay=600)
    for counters in (COUNTERS, (COUNTERS[0], late)):
        work = impressions(split="given", counters=counters).work_on(log)
        for name, content in work.files.items():
            (tmp_path / name).write_bytes(content)
        features = RankerFeatures.load(tmp_path)
        assert "item_id.count" in features.asked and "genre" not in features.asked
        wanted = features.encoder.batch({name: column(work, name, "test") for name in features.encoder.widths})
        requests = asked.tail(55).select("user_id", "item_id", "device").to_dicts()
        for name, values in features.rows(requests).items():
            np.testing.assert_array_equal(values, wanted[name], err_msg=name)
    brought = features.rows([{**requests[0], "item_id.count": 1e9, "history": [3]}])
    assert brought["field/item_id.count"] == 5 and brought["field/history"][0, 1] == 0


def test_counters_and_histories_know_what_came_before() -> None:
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 2, 1, 1, 2, 1],
            "item_id": [7, 8, 7, 7, 9, 7, 7],
            "timestamp": [10, 20, 20, 20, 30, 40, 50],
            "click": [1, 1, 0, 0, 1, 1, 0],
            "split": ["train"] * 5 + ["valid", "test"],
        }
    )
    fields = (
        Categorical(columns=("item_id",)),
        SequenceOf(columns=("history",), of="item_id", limit=2),
        Numeric(columns=("item_id.count", "item_id.click"), scale="none", presence=False, clip=100.0),
    )
    for events, counts, positives in (
        ("train", [0, 0, 1, 1, 0, 3, 3], [0, 0, 1, 1, 0, 1, 1]),
        ("all", [0, 0, 1, 1, 0, 3, 4], [0, 0, 1, 1, 0, 1, 2]),
    ):
        task = Impressions(
            fields=fields,
            labels={"click": "click"},
            counters=(Counter(columns="item_id", prior=2.0),),
            histories=(History(head="click", limit=2),),
            split="given",
            events=events,
        )
        work = task.work_on(ImpressionLog(rows=frame))
        splits = ("train", "valid", "test")
        codes = np.concatenate([column(work, "codes", s) for s in splits])
        numbers = np.concatenate([column(work, "numbers", s) for s in splits])
        assert numbers[:, 0].tolist() == counts
        seen = [0, 1, 1, 1, 4, 5, 5 if events == "train" else 6]
        clicks = [0, 1, 1, 1, 2, 3, 3 if events == "train" else 4]
        rates = [
            (p + 2 * (c + 1) / (s + 2)) / (n + 2) for p, n, c, s in zip(positives, counts, clicks, seen, strict=True)
        ]
        np.testing.assert_allclose(numbers[:, 1], rates, rtol=1e-6)
        row = {0: 0, 7: codes[0, 0], 8: codes[1, 0], 9: codes[4, 0]}
        wanted = [[0, 0], [7, 0], [0, 0], [7, 0], [7, 8], [0, 0], [8, 9]]
        assert codes[:, 1:].tolist() == [[row[i] for i in pair] for pair in wanted]


def test_what_was_done_stands_beside_the_items_of_a_history() -> None:
    """Place by place, also where it is not known, and with a vocabulary of its own."""
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 1, 1],
            "item_id": [7, 8, 9, 7, 9, 7],
            "rating": [4.0, None, 3.0, 5.0, 4.5, 1.0],
            "timestamp": [10, 20, 30, 40, 50, 60],
            "click": [1, 1, 0, 0, 1, 0],
            "split": ["train"] * 4 + ["valid", "test"],
        }
    )
    task = Impressions(
        fields=(
            Categorical(columns=("item_id",)),
            SequenceOf(columns=("history",), of="item_id", limit=3),
            SequenceOf(columns=("done",), limit=3),
        ),
        labels={"click": "click"},
        histories=(History(limit=3, beside={"done": "rating"}),),
        split="given",
        events="all",
    )
    work = task.work_on(ImpressionLog(rows=frame))
    codes = np.concatenate([column(work, "codes", split) for split in ("train", "valid", "test")])
    items, done = codes[:, 1:4], codes[:, 4:]
    assert ((items > 0) == (done > 0)).all() and (items > 0).sum(1).tolist() == [0, 1, 2, 0, 3, 3]
    assert done[4, 1:].tolist() == done[5, :2].tolist()  # a rating that is missing, and one of 3
    assert len({*done[4].tolist()}) == 3 and done[5, 1] == done[5, 2]  # 3 and 4.5, which no training row was told of


def test_a_split_by_time_keeps_a_gap() -> None:
    times = np.arange(1000)
    log = log_of(user_id=times % 7, item_id=times % 5, timestamp=times, label=times % 2)
    task = Impressions(fields=(Categorical(columns="item_id"),), valid_fraction=0.2, test_fraction=0.1, gap=30)
    work = task.work_on(log)
    bounds = {s: (column(work, "time", s).min(), column(work, "time", s).max()) for s in ("train", "valid", "test")}
    assert bounds == {"train": (0, 669), "valid": (700, 869), "test": (900, 999)}


def test_a_split_by_time_within_users_holds_out_the_last_of_each() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(5), [1, 4, 10, 40, 200])
    times = rng.permutation(len(users)) // 2  # some rows share a second, a user's own too
    log = log_of(user_id=users, item_id=times % 5, timestamp=times, label=times % 2)
    task = Impressions(fields=(Categorical(columns="item_id"),), split="user_time", valid_fraction=0.2)
    work = task.work_on(log)
    at = {s: (column(work, "user_index", s), column(work, "time", s)) for s in ("train", "valid", "test")}
    ids = work.users["user_id"].to_numpy()
    for user in range(5):
        train, valid, test = (when[ids[who] == user] for who, when in at.values())
        rows = len(train) + len(valid) + len(test)
        assert rows == (users == user).sum() and len(train)
        assert max(train, default=-1) < min([*valid, *test], default=10**9) and max(valid, default=-1) < min(
            test, default=10**9
        )
        assert abs(len(train) - np.ceil(0.7 * rows)) <= 1 and abs(len(test) - 0.1 * rows) <= 1.5
    kept = dataclasses.replace(task, gap=10).work_on(log)
    train, valid = (column(kept, "time", s)[ids[column(kept, "user_index", s)] == 4] for s in ("train", "valid"))
    assert train.max() < valid.min() - 10


def test_a_random_split_has_the_shares_in_every_domain_and_label() -> None:
    rng = np.random.default_rng(0)
    domain, label = rng.choice(["a", "b", "c"], 2000, p=[0.7, 0.25, 0.05]), (rng.random(2000) < 0.2).astype(int)
    log = log_of(user_id=rng.integers(0, 9, 2000), item_id=rng.integers(0, 9, 2000), label=label, domain=domain)
    settings = {"fields": (Categorical(columns="item_id"),), "split": "random", "domain": "domain"}
    work = Impressions(valid_fraction=0.2, test_fraction=0.3, **settings).work_on(log)
    assert work.facts["domains"] == ["a", "b", "c"]
    for number, name in enumerate("abc"):
        for kind in (0, 1):
            size = int(((domain == name) & (label == kind)).sum())
            for split, share in (("valid", 0.2), ("test", 0.3)):
                mine = (column(work, "domain", split) == number) & (column(work, "labels", split)[:, 0] == kind)
                assert mine.sum() == round(size * share)
    again, other = (Impressions(seed=seed, **settings).work_on(log) for seed in (0, 1))
    assert not np.array_equal(column(again, "user_index", "test"), column(other, "user_index", "test"))


def test_the_domain_of_a_row_may_be_that_of_its_user() -> None:
    work, tables = impressions(domain="country").work(), WORLD.tables()
    assert tables.users is not None
    country = dict(zip(tables.users["user_id"], tables.users["country"], strict=True))
    users, names = work.users["user_id"].to_list(), work.facts["domains"]
    for split in ("train", "valid", "test"):
        pairs = zip(column(work, "user_index", split), column(work, "domain", split), strict=True)
        assert all(names[domain] == country[users[user]] for user, domain in pairs)
    counts = np.bincount(column(work, "domain"))
    assert (np.diff(counts) <= 0).all()


def test_drawn_negatives_are_items_the_user_never_had() -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 20, 400), np.minimum(rng.zipf(1.4, 400), 60)
    log = log_of(user_id=user, item_id=item, timestamp=np.arange(400))
    fields = (Categorical(columns=("user_id", "item_id")),)
    for power in (0.0, 1.0):
        work = Impressions(fields=fields, labels={"click": "1"}, negatives=3, negative_power=power).work_on(log)
        had = {(u, i) for u, i in zip(user.tolist(), item.tolist(), strict=True)}
        ids = [int(i or 0) for i in work.vocab.decode(np.arange(2, 2 + work.vocab.num_items))]
        users = work.users["user_id"].to_list()
        for split in ("train", "valid", "test"):
            labels = column(work, "labels", split)[:, 0]
            assert (labels == 0).sum() == 3 * (labels == 1).sum() and (labels[::4] == 1).all()
            rows = zip(column(work, "user_index", split), column(work, "items", split)[:, 0], labels, strict=True)
            for who, what, label in rows:
                assert ((users[who], ids[what - 2]) in had) == bool(label)
        drawn = column(work, "items")[:, 0][column(work, "labels")[:, 0] == 0]
        spread = np.bincount(drawn - 2, minlength=work.vocab.num_items)
        assert (spread[5:15].mean() > 2 * spread[30:].mean()) == (power == 1.0)


def test_a_share_of_the_training_negatives_is_kept() -> None:
    work, whole = impressions(keep_negatives=0.25).work(), impressions().work()
    for split in ("train", "valid", "test"):
        some, every = (column(w, "labels", split)[:, 0] for w in (work, whole))
        assert (some == 1).sum() == (every == 1).sum()
        kept = (some == 0).sum() / (every == 0).sum()
        assert abs(kept - 0.25) < 0.05 if split == "train" else kept == 1
    assert work.facts["keep_negatives"] == 0.25


def test_labels_follow_their_rules() -> None:
    columns = {
        "rating": [5, 3, None, 4],
        "event": ["buy", "view", "view", None],
        "split": ["train"] * 2 + ["valid", "test"],
    }
    labels = {"like": "rating >= 4", "buy": "event = buy", "seen": "event != buy", "all": "1"}
    task = Impressions(fields=(Categorical(columns="event"),), labels=labels, split="given")
    work = task.work_on(log_of(**columns))
    found = np.concatenate([column(work, "labels", split) for split in ("train", "valid", "test")])
    assert found.tolist() == [[1, 1, 0, 1], [0, 0, 1, 1], [-1, 0, 1, 1], [1, -1, -1, 1]]
    heads = work.facts["heads"]
    assert list(heads) == list(labels) and heads["like"] == {"rule": "rating >= 4", "rows": 2, "rate": 0.5}
    assert Rule.read("x", "a=b c") == Rule(column="a", sign="==", than="b c")


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"labels": {"click": "rating"}}, DataError, "the label is 5"),
        ({"labels": {"click": "stars > 3"}}, DataError, "no column stars"),
        ({"labels": {"click": "rating > many"}}, DataError, "is not"),
        ({"split": "given"}, DataError, "needs a column split"),
        ({"domain": "nowhere"}, DataError, "no column nowhere"),
        ({"weight": "nowhere"}, DataError, "no column nowhere"),
        ({"counters": (Counter(columns="nowhere"),)}, DataError, "no column nowhere"),
        ({"fields": (Categorical(columns="nowhere"),)}, DataError, "no column nowhere"),
        ({"gap": 10**9}, DataError, "has no rows"),
    ],
)
def test_what_the_data_lacks_is_told(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    frame = pl.DataFrame({"user_id": [1] * 20, "item_id": [1] * 20, "rating": [5] * 20, "timestamp": range(20)})
    told: dict[str, Any] = {"fields": (Categorical(columns="item_id"),), "labels": {"like": "rating >= 4"}, **settings}
    with pytest.raises(error, match=message):
        Impressions(**told).work_on(ImpressionLog(rows=frame))


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": {"a b": "click"}},
        {"labels": {"click": "rating >"}},
        {"labels": {}},
        {"split": "user"},
        {"valid_fraction": 0.6, "test_fraction": 0.5},
        {"keep_negatives": 0.0},
        {"histories": (History(head="buy"),)},
    ],
)
def test_settings_that_make_no_task_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        _ = impressions(**settings).rules


def test_items_of_the_catalogue_have_their_rows_in_training_or_not() -> None:
    world = RatedWorld(rows=300, users=40, items=300)
    task = impressions(
        data=DataDir(simulate=world), fields=(CatalogueItem(columns=("item_id",)),), counters=(), histories=()
    )
    work = task.work()
    for split in SPLITS:
        np.testing.assert_array_equal(column(work, "codes", split)[:, 0], column(work, "items", split)[:, 0])
    assert set(column(work, "items", "test").ravel()) - set(column(work, "items").ravel())  # some are new


@pytest.mark.parametrize("kind", [pl.Int64, pl.Int32, pl.String])
def test_what_stands_for_a_title_may_be_several_columns(kind: type[pl.DataType]) -> None:
    """Whatever the type of the ids in the table of items."""
    items = pl.DataFrame({"item_id": [1, 2, 3], "title": ["Red", None, None], "genres": [["a", "b"], ["c"], None]})
    log = log_of(user_id=[1] * 9, item_id=[1, 2, 3] * 3, timestamp=list(range(9)), label=[0, 1, 1] * 3)
    log = dataclasses.replace(log, sides={"items": items.cast({"item_id": kind})})
    for titles, expected in (((), ["Red", None, None]), (("title", "genres"), ["Red a b", "c", None])):
        work = Impressions(titles=titles, valid_fraction=0.3, test_fraction=0.3).work_on(log)
        assert work.items.sort("item_id")["title"].to_list() == expected
    with pytest.raises(DataError, match="no column brand"):
        Impressions(titles=("brand",)).work_on(log)
