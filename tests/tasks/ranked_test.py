"""Ranking tasks in words against a plain account of them, and what no prompt may tell."""

import re
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM
from recjax.prompts.fields import Entity, Field
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.prompts.writer import Budget
from recjax.tasks.prompted import Periods, Told, Wording
from recjax.tasks.prompted_ranking import GenreAffinity, Ranked, Rated, Relevance, Stars, WatchNext
from recjax.tasks.work import Work, examples_of

DAY = 86_400
GENRES = ("drama", "comedy", "war", "noir")
WORDING = Wording(tokenizer=TokenizerConfig(size=600), items=Entity(fields=(Field(name="title", label=""),)))
PERIODS = Periods(valid_fraction=0.15, test_fraction=0.2, gap_days=15)
TOLD = Told(wording=WORDING, periods=PERIODS)
COMMON: dict[str, Any] = {"told": TOLD, "history": 5, "min_history": 2, "per_user": 3}


def tables(seed: int = 0, users: int = 25, events: int = 400) -> Tables:
    """A log in which every event has an item of its own, which says in a prompt which event it is; many ties."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, users, events),
            "item_id": np.arange(events),
            "timestamp": rng.integers(0, 100, events) * DAY,
            "rating": rng.integers(1, 11, events) / 2,
        }
    ).sort(["user_id", "timestamp"], maintain_order=True)
    items = {
        "item_id": np.arange(events),
        "title": [f"Film {k}x" for k in range(events)],
        "genres": [[GENRES[k % 4], GENRES[k * k % 3]] for k in range(events)],
    }
    queries = {"query_id": range(40), "text": [f"query {k}" if k % 4 else f"QUERY  {k + 1}" for k in range(40)]}
    pairs = {(int(q), int(i)) for q, i in zip(rng.integers(0, 40, 300), rng.integers(0, events, 300), strict=True)}
    judged = pl.DataFrame(sorted(pairs), schema=["query_id", "item_id"], orient="row")
    return Tables(
        interactions=frame.with_columns(order=pl.int_range(pl.len()).over("user_id")),
        items=pl.DataFrame(items),
        queries=pl.DataFrame(queries),
        relevance=judged.with_columns(label=pl.col("item_id") % 3),
    )


def spoken(work: Work, rows: np.ndarray) -> list[int]:
    """The items that a text names, in order."""
    assert work.text is not None
    return [int(found) for found in re.findall(r"Film (\d+)x", work.text.decode(rows - FIRST_ITEM))]


def suffixes(record: dict[str, Any]) -> list[np.ndarray]:
    return np.split(record["suffixes"], np.cumsum(record["suffix_lengths"])[:-1])


def events_of(log: Tables, user: int) -> list[dict[str, Any]]:
    return log.interactions.filter(pl.col("user_id") == user).to_dicts()


def bounds(work: Work) -> tuple[int, int]:
    """Training is before the first time, the test from the second on."""
    first, second = re.findall(r"(?:before|from) (\d+)", work.facts["split_rule"])
    return int(first), int(second)


def users_of(work: Work) -> list[int]:
    return work.users["user_id"].to_list()


@pytest.mark.parametrize("task", [Rated(**COMMON), Rated(**COMMON, least=2.5, name="fine"), Stars(**COMMON)])
@pytest.mark.parametrize("seed", range(2))
def test_records_and_examples_are_those_of_a_plain_account(task: Ranked, seed: int) -> None:
    log = tables(seed)
    work = task.work_on(log)
    train_end, test_from = bounds(work)
    assert test_from - train_end >= 15 * DAY
    users = users_of(work)

    def label(event: dict[str, Any]) -> int:
        if isinstance(task, Rated):
            return int(event["rating"] >= task.least)
        return min(max(int(np.floor(event["rating"] + 0.5)), 1), 5) - 1

    def older(events: list[dict[str, Any]], event: dict[str, Any]) -> list[dict[str, Any]]:
        return [e for e in events if e["timestamp"] < event["timestamp"]]

    for split, first, end in (("valid", train_end, test_from), ("test", test_from, 10**12)):
        records = {users[int(r["user_index"])]: r for r in examples_of(work, split)}
        expected = {}
        for user in set(users):
            events = events_of(log, user)
            asked = [e for e in events if first <= e["timestamp"] < end and len(older(events, e)) >= 2]
            if asked:
                expected[user] = older(events, asked[0]), asked[: task.candidates]
        assert set(records) == set(expected) and len(records) > 5
        for user, (past, asked) in expected.items():
            record = records[user]
            assert spoken(work, record["items"]) == [e["item_id"] for e in past[-5:]]
            assert [spoken(work, one) for one in suffixes(record)] == [[e["item_id"]] for e in asked]
            assert record["labels"].tolist() == [label(e) for e in asked]
            assert (record["history_events"], record["total_events"]) == (min(len(past), 5), len(past))
    rows = work.facts["label_rows"]
    assert len(rows) == len(task.words)
    count = dict.fromkeys(users, 0)
    for example in examples_of(work, "train"):
        user = users[int(example["user_index"])]
        *past, item = spoken(work, example["items"])
        events = {e["item_id"]: e for e in events_of(log, user)}
        assert events[item]["timestamp"] < train_end
        assert past == [e["item_id"] for e in older(list(events.values()), events[item])[-5:]]
        answer = example["items"][example["loss"] > 0]
        assert len(answer) == 2 and answer[0] == rows[label(events[item])]
        assert example["loss"][-2:].tolist() == [1, 1]
        count[user] += 1
    for user, asked in count.items():
        events = [e for e in events_of(log, user) if e["timestamp"] < train_end]
        assert asked == min(3, sum(len(older(events, e)) >= 2 for e in events))


@pytest.mark.parametrize("kind", [Rated, WatchNext, GenreAffinity])
@pytest.mark.parametrize("seed", range(2))
def test_nothing_that_is_trained_on_or_told_comes_from_later_than_it_may(kind: type[Ranked], seed: int) -> None:
    """Every event is an item of its own, so what a prompt names says which events it knows of."""
    log = tables(seed)
    work = kind(**COMMON, **({"draw": "uniform"} if kind is WatchNext else {})).work_on(log)
    train_end, test_from = bounds(work)
    when = dict(log.interactions.select("item_id", "timestamp").iter_rows())
    for example in examples_of(work, "train"):
        told = spoken(work, example["items"])
        told = told[:-1] if kind is not GenreAffinity else told  # the last one is the question's, perhaps a drawn item
        assert all(when[item] < train_end for item in told)
    for split, first in (("valid", train_end), ("test", test_from)):
        for record in examples_of(work, split):
            told = [when[item] for item in spoken(work, record["items"])]
            assert told == sorted(told)
            if kind is Rated:
                asked = [when[item] for one in suffixes(record) for item in spoken(work, one)]
                assert min(asked) >= first and max(told) < min(asked)
            if kind is WatchNext:
                (asked,) = spoken(work, suffixes(record)[0])
                assert max(told) < when[asked] >= first


def test_a_longer_history_changes_neither_who_is_asked_nor_what() -> None:
    log = tables()
    works = [Rated(**{**COMMON, "history": n}).work_on(log) for n in (1, 3, 50)]
    for split in ("valid", "test"):
        records = [list(examples_of(work, split)) for work in works]
        for one, two, many in zip(*records, strict=True):
            for name in ("user_index", "suffixes", "suffix_lengths", "labels", "total_events"):
                np.testing.assert_array_equal(one[name], two[name])
                np.testing.assert_array_equal(one[name], many[name])
            told = [spoken(works[0], r["items"]) for r in (one, two, many)]
            assert told[0] == told[2][-1:] and told[1] == told[2][-3:] and len(told[2]) == many["total_events"]


def test_more_questions_a_user_hold_those_of_fewer() -> None:
    def asked(per_user: int) -> set[tuple[int, int]]:
        work = Rated(**{**COMMON, "per_user": per_user}).work_on(tables())
        return {(int(e["user_index"]), spoken(work, e["items"])[-1]) for e in examples_of(work, "train")}

    few, some, many = asked(1), asked(3), asked(9)
    assert few < some < many
    assert len({user for user, _ in few}) == len(few)


@pytest.mark.parametrize("draw", ["uniform", "popular"])
def test_the_next_item_is_among_items_that_the_user_never_picked(draw: str) -> None:
    log = tables()
    work = WatchNext(**COMMON, draw=draw, candidates=12, negatives=2).work_on(log)
    picked = {user: set(e["item_id"] for e in events_of(log, user)) for user in users_of(work)}
    records = list(examples_of(work, "test"))
    assert records
    for record in records:
        first, *others = (spoken(work, one)[0] for one in suffixes(record))
        mine = picked[users_of(work)[int(record["user_index"])]]
        assert record["labels"].tolist() == [1] + [0] * len(others)
        assert first in mine and not mine & set(others) and len(others) == len(set(others)) == 11
    labels = [int(e["items"][-2]) == work.facts["label_rows"][1] for e in examples_of(work, "train")]
    assert np.mean(labels) == pytest.approx(1 / 3)


def test_a_genre_is_right_when_one_of_the_next_items_has_it() -> None:
    log = tables()
    assert log.items is not None
    genres = dict(log.items.select("item_id", "genres").iter_rows())
    work = GenreAffinity(**COMMON, horizon=3, candidates=3).work_on(log)
    _, test_from = bounds(work)
    assert work.text is not None
    records = list(examples_of(work, "test"))
    assert records
    for record in records:
        events = [e for e in events_of(log, users_of(work)[int(record["user_index"])])]
        later = [e for e in events if e["timestamp"] >= test_from]
        told = record["total_events"]
        following = [e for e in later if sum(o["timestamp"] < e["timestamp"] for o in events) >= 2][:3]
        assert sum(e["timestamp"] < following[0]["timestamp"] for e in events) == told
        coming = {genre for e in following for genre in genres[e["item_id"]]}
        asked = [re.findall(r"|".join(GENRES), work.text.decode(one - FIRST_ITEM))[0] for one in suffixes(record)]
        assert len(set(asked)) == 3
        assert record["labels"].tolist() == [int(genre in coming) for genre in asked]
    labels = [int(e["items"][-2]) == work.facts["label_rows"][1] for e in examples_of(work, "train")]
    assert 0.3 < np.mean(labels) < 0.8


@pytest.mark.parametrize("negatives", [0, 2])
def test_judgments_are_those_of_the_data_and_queries_are_in_one_split(negatives: int) -> None:
    log = tables()
    assert log.queries is not None and log.relevance is not None
    settings = {"told": TOLD, "valid_fraction": 0.2, "test_fraction": 0.2, "per_user": 4}
    work = Relevance(**settings, negatives=negatives, min_label=2.0, candidates=9).work_on(log)
    text_of = {q: " ".join(t.split()).casefold() for q, t in log.queries.iter_rows()}
    best: dict[tuple[str, int], int] = {}
    for query, item, label in log.relevance.iter_rows():
        best[text_of[query], item] = max(label, best.get((text_of[query], item), 0))
    found: dict[str, set[str]] = {}
    assert work.text is not None
    for split in ("train", "valid", "test"):
        found[split] = set()
        for example in examples_of(work, split):
            prompt = work.text.decode(example["items"] - FIRST_ITEM)
            query = re.findall(r"for: (.*)\n", prompt)[0].casefold()
            found[split].add(query)
            if split == "train":
                asked = [(spoken(work, example["items"])[-1], int(example["items"][-2] == work.facts["label_rows"][1]))]
            else:
                items = (spoken(work, one)[0] for one in suffixes(example))
                asked = list(zip(items, example["labels"].tolist(), strict=True))
                assert len(asked) <= 9 and example["history_events"] == example["total_events"] == 0
            for item, label in asked:
                assert label == int(best.get((query, item), 0) >= 2)
                assert negatives or (query, item) in best
    assert all(found.values()) and not found["train"] & found["test"] and not found["valid"] & found["test"]
    assert set.union(*found.values()) == {query for query, _ in best}


def test_the_last_events_are_asked_about_where_a_log_has_no_times() -> None:
    log = tables()
    plain = Tables(interactions=log.interactions.drop("timestamp"), items=log.items)
    work = Rated(**{**COMMON, "told": Told(wording=WORDING, periods=Periods(by="last", held_out=3))}).work_on(plain)
    for split, ago in (("valid", 6), ("test", 3)):
        for record in examples_of(work, split):
            items = [e["item_id"] for e in events_of(log, users_of(work)[int(record["user_index"])])]
            start = max(len(items) - ago, 2)
            assert [spoken(work, one)[0] for one in suffixes(record)] == items[start : len(items) - ago + 3]
            assert spoken(work, record["items"]) == items[max(start - 5, 0) : start]


def test_without_a_mask_every_token_is_predicted_and_the_tokens_are_the_same() -> None:
    log = tables()
    pairs = (examples_of(Rated(**COMMON, mask=mask).work_on(log), "train") for mask in (True, False))
    for masked, plain in zip(*pairs, strict=True):
        np.testing.assert_array_equal(masked["items"], plain["items"])
        assert plain["loss"].all() and masked["loss"].sum() == 2


def test_all_tasks_of_a_data_directory_have_one_vocabulary() -> None:
    log = tables()
    tasks = [kind(**COMMON) for kind in (Rated, Stars, WatchNext, GenreAffinity, Relevance)]
    assert len({task.work_on(log).vocab.hash for task in tasks}) == 1


def test_data_that_a_task_cannot_ask_about_is_refused() -> None:
    log = tables()
    assert log.items is not None
    unrated = Tables(interactions=log.interactions.drop("rating"), items=log.items)
    with pytest.raises(DataError, match="needs ratings(.|\n)*DataDir.columns"):
        Rated(**COMMON).work_on(unrated)
    with pytest.raises(DataError, match="needs genres"):
        GenreAffinity(**COMMON).work_on(Tables(interactions=log.interactions, items=log.items.drop("genres")))
    with pytest.raises(DataError, match="needs judgments"):
        Relevance(**COMMON).work_on(unrated)
    with pytest.raises(DataError, match="needs grades"):
        words = log.relevance.with_columns(label=pl.lit("good")) if log.relevance is not None else None
        Relevance(**COMMON).work_on(
            Tables(interactions=log.interactions, items=log.items, queries=log.queries, relevance=words)
        )
    with pytest.raises(ConfigError, match="'Certainly' is not one token"):
        Rated(**COMMON, words=("No", "Certainly")).work_on(log)
    with pytest.raises(DataError, match="without any history(.|\n)*at most 30"):
        Rated(**COMMON, budget=Budget(length=30)).work_on(log)
    with pytest.raises(DataError, match="nothing to train on"):
        Rated(**{**COMMON, "min_history": 1000}).work_on(log)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rated(name="a b"), "Rated.name"),
        (lambda: Rated(per_user=0), "Rated.per_user"),
        (lambda: WatchNext(draw="rare"), "WatchNext.draw"),
        (lambda: GenreAffinity(horizon=0), "GenreAffinity.horizon"),
        (lambda: Relevance(test_fraction=0.0), "Relevance.valid_fraction"),
        (lambda: Rated(template=Stars().template.__class__(instruction=("x",), question=("y",))), "leaves out"),
        (lambda: Periods(by="week"), "Periods.by"),
        (lambda: Periods(gap_days=-1), "Periods.gap_days"),
        (lambda: Wording(chat="alpaca"), "no chat format"),
        (lambda: Wording(rated="rated"), "Wording.rated"),
        (lambda: TokenizerConfig(size=100), "TokenizerConfig.size"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
