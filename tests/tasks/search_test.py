"""The search task against a plain Python account of what it should do, and its promises about leaks, limits, splits."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM
from recjax.tasks.cache import described
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import Work, examples_of

WORDS = ("red", "Blue", "quiet", "loud", "old", "new", "small", "BIG")
Pair = tuple[str, str]


def random_tables(seed: int, *, users: bool = True, judged: int = 400) -> Tables:
    """A log and judgments with everything odd in them: twins of queries, unknown items and queries, other users."""
    rng = np.random.default_rng(seed)
    log = pl.DataFrame(
        {
            "user_id": rng.integers(0, 25, 300),
            "item_id": [f"i{k}" for k in rng.integers(0, 40, 300)],
            "timestamp": rng.integers(0, 90, 300) * 10,
        }
    ).sort(["user_id", "timestamp"], maintain_order=True)
    log = log.with_columns(order=pl.int_range(pl.len()).over("user_id"))
    texts = [" ".join(rng.choice(WORDS, 2)) for _ in range(30)] + ["  ", "\u200b"]
    texts[3] = texts[0].upper() + " "
    relevance = pl.DataFrame(
        {
            "query_id": rng.integers(0, 34, judged),
            "item_id": [f"i{k}" for k in rng.integers(0, 44, judged)],
            "label": rng.integers(0, 4, judged),
            "user_id": rng.integers(0, 28, judged),
        }
    )
    return Tables(
        interactions=log,
        items=pl.DataFrame({"item_id": [f"i{k}" for k in range(40)], "title": [f"Thing {k}" for k in range(40)]}),
        queries=pl.DataFrame({"query_id": range(32), "text": texts}),
        relevance=relevance if users else relevance.drop("user_id"),
    )


def key(text: str) -> str:
    return " ".join(text.split()).casefold()


def judgments_by_hand(task: Search, tables: Tables) -> list[tuple[Pair, Any]]:
    """((query's text, item), user) of every judgment that counts."""
    assert tables.queries is not None and tables.relevance is not None
    texts = {q: key(t) for q, t in tables.queries.iter_rows() if key(t).strip("\u200b")}
    known = set(tables.interactions["item_id"])
    rows = tables.relevance.with_columns(
        user_id=tables.relevance.get_column("user_id") if "user_id" in tables.relevance.columns else pl.lit(None)
    ).iter_rows(named=True)
    return [
        ((texts[r["query_id"]], r["item_id"]), r["user_id"])
        for r in rows
        if r["label"] >= task.min_label and r["query_id"] in texts and r["item_id"] in known
    ]


def held_out_by_hand(task: Search, tables: Tables) -> set[tuple[int, str]]:
    """(user, item) of the events that the log task holds out; the last two of each user for leave one out."""
    events: dict[int, list[str]] = {}
    for user, item in tables.interactions.select("user_id", "item_id").iter_rows():
        events.setdefault(user, []).append(item)
    held = task.log.held_out + 1 if task.log.split == "leave_last" else 2
    return {(u, i) for u, items in events.items() if len(items) > held for i in items[-held:]}


def pairs_of(work: Work, split: str) -> list[Pair]:
    assert work.text is not None
    found = []
    for example in examples_of(work, split):
        (row,) = example["items"] if split == "train" else [example["label"]]
        found.append((work.text.decode(example["text"]), work.vocab.decode([row])[0]))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split": "query"},
        {"min_label": 2.0},
        {"drop_leaks": False},
        {"log": NextItem(split="leave_last", held_out=4)},
        {"per_item": 3},
    ],
)
def test_pairs_are_those_of_a_plain_account(seed: int, settings: dict[str, Any]) -> None:
    task, tables = Search(**settings), random_tables(seed)
    work = task.work_on(tables)
    judged = judgments_by_hand(task, tables)
    held = held_out_by_hand(task, tables) if task.drop_leaks else set()
    clean = {pair for pair, user in judged if (user, pair[1]) not in held}
    found = {split: pairs_of(work, split) for split in work.schemas}
    for split, pairs in found.items():
        assert len(pairs) == len(set(pairs)) == work.facts["counts"][split]["examples"]
    out = {*found["valid"], *found["test"]}
    assert len(out) > 5 and not set(found["valid"]) & set(found["test"]) and out <= {pair for pair, _ in judged}
    wanted = {pair for pair, _ in judged if pair not in out and pair in clean}
    if task.per_item is None:
        assert set(found["train"]) == wanted
    else:
        left = Counter(item for _, item in found["train"])
        assert set(found["train"]) < wanted
        assert left == {item: min(task.per_item, n) for item, n in Counter(i for _, i in wanted).items()}
    counts = work.facts["counts"]["relevance"]
    trained_or_leaked = {pair for pair, _ in judged} - out
    assert counts["pairs_leaked"] == len(trained_or_leaked - clean)
    assert counts["leaks"] == sum((user, pair[1]) in held and pair not in out for pair, user in judged)
    if task.drop_leaks:
        assert counts["leaks"] > 0
    if task.split == "query":
        queries = [{query for query, _ in pairs} for pairs in found.values()]
        assert not queries[0] & queries[1] and not queries[0] & queries[2] and not queries[1] & queries[2]


@pytest.mark.parametrize("seed", range(3))
def test_nobody_s_held_out_action_is_what_a_training_pair_comes_from(seed: int) -> None:
    """With every judgment made by the user in a held-out event itself, no pair of such an event is left."""
    tables, task = random_tables(seed), Search(valid_fraction=0.0, test_fraction=0.0)
    held = held_out_by_hand(task, tables)
    judged = pl.DataFrame(
        [{"query_id": k % 30, "item_id": i, "label": 1, "user_id": u} for k, (u, i) in enumerate(sorted(held))]
    )
    other = {"query_id": [7, 7], "item_id": ["i1", "i2"], "label": [1, 1], "user_id": [None, 999]}
    both = pl.concat([judged, pl.DataFrame(other)], how="vertical_relaxed")
    work = task.work_on(dataclasses.replace(tables, relevance=both))
    assert {item for _, item in pairs_of(work, "train")} == {"i1", "i2"}
    assert work.facts["counts"]["relevance"]["leaks"] == len(held)
    kept = Search(valid_fraction=0.0, test_fraction=0.0, drop_leaks=False)
    assert kept.work_on(dataclasses.replace(tables, relevance=both)).facts["counts"]["train"]["examples"] > 20


def test_what_is_trained_on_does_not_change_what_is_asked() -> None:
    """Held-out examples are the same with and without limits and leakage control: seen items too."""
    tables = random_tables(1)
    works = [Search(**s).work_on(tables) for s in ({}, {"per_item": 1}, {"drop_leaks": False})]
    for split in ("valid", "test"):
        asked = [
            [(e["user_index"].item(), e["label"].item(), e["seen"].tolist()) for e in examples_of(work, split)]
            for work in works
        ]
        assert asked[0] == asked[1] == asked[2]


def test_seen_items_are_those_of_the_query_s_training_pairs() -> None:
    task, tables = Search(drop_leaks=False), random_tables(2)
    work = task.work_on(tables)
    assert work.text is not None
    trained: dict[str, set[str]] = {}
    for query, item in pairs_of(work, "train"):
        trained.setdefault(query, set()).add(item)
    for split in ("valid", "test"):
        for example in examples_of(work, split):
            seen = work.vocab.decode(example["seen"])
            assert set(seen) == trained.get(work.text.decode(example["text"]), set()) and len(seen) == len(set(seen))
            assert example["label"] not in example["seen"]
            assert not len(example["items"]) and example["train_events"] == 0
            assert example["future"].tolist() == [example["label"]] and example["future_events"] == 1


def test_a_higher_limit_keeps_what_a_lower_one_keeps() -> None:
    tables, kept = random_tables(0), []
    for limit in (1, 2, 5, 50):
        kept.append(set(pairs_of(Search(per_item=limit).work_on(tables), "train")))
    assert kept[0] < kept[1] < kept[2] <= kept[3] == set(pairs_of(Search().work_on(tables), "train"))
    other = set(pairs_of(Search(per_item=1, seed=1, split="query").work_on(tables), "train"))
    assert other != set(pairs_of(Search(per_item=1, split="query").work_on(tables), "train"))


@pytest.mark.parametrize("split", ["pair", "query"])
def test_neither_order_nor_other_judgments_move_a_pair(split: str) -> None:
    tables = random_tables(3)
    assert tables.relevance is not None and tables.queries is not None
    task = Search(split=split, drop_leaks=False)
    first = {s: set(pairs_of(task.work_on(tables), s)) for s in ("train", "valid", "test")}
    shuffled = dataclasses.replace(
        tables, relevance=tables.relevance.sample(fraction=1, shuffle=True, seed=0), queries=tables.queries.reverse()
    )
    again = task.work_on(shuffled)
    assert {s: set(pairs_of(again, s)) for s in first} == first
    assert again.text == task.work_on(tables).text
    fewer = task.work_on(dataclasses.replace(tables, relevance=tables.relevance.head(200)))
    for s, pairs in first.items():
        assert set(pairs_of(fewer, s)) <= pairs


def test_shares_of_the_splits_are_as_asked() -> None:
    tables = random_tables(0, judged=4000)
    work = Search(valid_fraction=0.2, test_fraction=0.3, drop_leaks=False).work_on(tables)
    sizes = np.array([work.facts["counts"][s]["examples"] for s in ("train", "valid", "test")])
    np.testing.assert_allclose(sizes / sizes.sum(), [0.5, 0.2, 0.3], atol=0.06)


def test_splits_can_be_given() -> None:
    tables = random_tables(0)
    assert tables.relevance is not None
    different = pl.DataFrame({"query_id": range(32), "text": [f"query {k}" for k in range(32)]})
    tables = dataclasses.replace(tables, queries=different)
    one = tables.relevance.unique(["query_id", "item_id"], maintain_order=True)
    said = one.with_columns(split=pl.Series(["train", "valid", "test"]).gather(np.arange(one.height) % 3))
    task = Search(split="given", drop_leaks=False)
    work = task.work_on(dataclasses.replace(tables, relevance=said))
    for split in work.schemas:
        mine = dataclasses.replace(tables, relevance=said.filter(pl.col("split") == split))
        assert set(pairs_of(work, split)) == {pair for pair, _ in judgments_by_hand(task, mine)}
    for column, message in (
        (pl.lit("late"), "'late' is no split"),
        (pl.lit(None, pl.String), "None is no split"),
    ):
        with pytest.raises(DataError, match=message):
            task.work_on(dataclasses.replace(tables, relevance=said.with_columns(split=column)))
    with pytest.raises(DataError, match="needs a column split"):
        task.work_on(tables)
    twice = pl.concat([said, said.with_columns(split=pl.lit("test"))])
    with pytest.raises(DataError, match="in two splits"):
        task.work_on(dataclasses.replace(tables, relevance=twice))


def test_labels_can_be_words() -> None:
    tables = random_tables(0)
    assert tables.relevance is not None
    words = {"Exact": 3.0, "Substitute": 2.0, "Complement": 1.0, "Irrelevant": 0.0}
    named = tables.relevance.with_columns(pl.Series("label", list(words)).gather(3 - tables.relevance["label"]))
    said = dataclasses.replace(tables, relevance=named)
    for split in ("train", "test"):
        found = pairs_of(Search(labels=words, min_label=2).work_on(said), split)
        assert found == pairs_of(Search(min_label=2).work_on(tables), split)
    with pytest.raises(DataError, match=r"is not a number(.|\n)*Search\.labels"):
        Search(labels={"Exact": 1}).work_on(said)


def test_items_and_rows_are_those_of_the_log() -> None:
    tables, task = random_tables(0), Search(log=NextItem(min_events=8), prompt="search: ")
    work, log = task.work_on(tables), task.log.work_on(tables)
    assert work.vocab == log.vocab and work.items.drop("train_count").equals(log.items.drop("train_count"))
    asked = Counter(example["items"].item() for example in examples_of(work, "train"))
    assert dict(zip(work.items["row"], work.items["train_count"], strict=True)) == {
        row: asked[row] for row in work.items["row"]
    }
    assert work.text is not None and all(q.startswith("search: ") for q, _ in pairs_of(work, "test"))
    numbers = [e["user_index"].item() for s in work.schemas for e in examples_of(work, s)]
    assert len(numbers) == len(set(numbers))
    assert all(e["items"].min() >= FIRST_ITEM for e in examples_of(work, "train"))
    queries = dict(work.users.iter_rows())
    assert tables.queries is not None
    texts = {q: key(t) for q, t in tables.queries.iter_rows()}
    for example in examples_of(work, "test"):
        assert "search: " + texts[queries[example["user_index"].item()]] == work.text.decode(example["text"])


def test_without_users_nothing_can_leak_and_the_manifest_says_so() -> None:
    work = Search().work_on(random_tables(0, users=False))
    assert work.facts["counts"]["relevance"]["leaks"] == 0 and "none possible" in work.facts["leak_rule"]


def test_a_model_is_told_by_what_it_holds(tmp_path: Any) -> None:
    from recjax.data.text import TextConfig, train_pieces

    for name in "ab":
        (tmp_path / name).write_bytes(train_pieces(["one two three"], size=20))
    one, other = (described(Search(text=TextConfig(model=str(tmp_path / n)))) for n in "ab")
    assert one == other and str(tmp_path) not in str(one)


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "random"},
        {"test_fraction": 0.5, "valid_fraction": 0.5},
        {"test_fraction": -0.1},
        {"per_item": 0},
        {"min_label": float("nan")},
        {"name": "a/b"},
    ],
)
def test_settings_that_make_no_task_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Search"):
        Search(**settings)


def test_data_that_lacks_what_the_task_needs_is_told() -> None:
    tables = random_tables(0)
    for name in ("queries", "relevance"):
        with pytest.raises(DataError, match="search needs queries and relevance"):
            Search().work_on(dataclasses.replace(tables, **{name: None}))
    with pytest.raises(DataError, match="is left to train on"):
        Search(min_label=9).work_on(tables)
