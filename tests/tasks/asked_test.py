"""Rows of what a ranking task in words asks: the same questions, told of the same events, and nothing later."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.counters import History
from recjax.data.fields import Categorical, SequenceOf
from recjax.data.tables import Tables
from recjax.prompts.fields import Entity, Field
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.tasks.asked_rows import AskedRows
from recjax.tasks.prompted import Periods, Told, Wording
from recjax.tasks.prompted_ranking import Rated
from recjax.tasks.work import Work, examples_of

DAY = 86_400
WORDING = Wording(tokenizer=TokenizerConfig(size=600), items=Entity(fields=(Field(name="title", label=""),)))
ASKED = Rated(
    told=Told(wording=WORDING, periods=Periods(valid_fraction=0.15, test_fraction=0.2, gap_days=5)),
    candidates=4,
    history=50,
)
TASK = AskedRows(
    asked=ASKED,
    fields=(Categorical(columns=("user_id", "item_id")), SequenceOf(columns=("past",), of="item_id")),
    histories=(History(column="past", limit=50),),
    joins=(),
)


def tables() -> Tables:
    """A log in which every event has an item of its own; many events at the same time."""
    rng = np.random.default_rng(3)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, 20, 500),
            "item_id": np.arange(500),
            "timestamp": rng.integers(0, 80, 500) * DAY,
            "rating": np.where(rng.random(500) < 0.1, np.nan, rng.integers(1, 6, 500)),
        }
    ).sort(["user_id", "timestamp"], maintain_order=True)
    items = {"item_id": np.arange(500), "title": [f"Film {k}x" for k in range(500)]}
    return Tables(
        interactions=frame.with_columns(order=pl.int_range(pl.len()).over("user_id")), items=pl.DataFrame(items)
    )


@pytest.fixture(scope="module")
def both() -> tuple[Work, Work]:
    """What is asked in words, and as rows."""
    return ASKED.work_on(tables()), TASK.work_on(tables())


def ids(work: Work, rows: np.ndarray) -> list[int]:
    """Item ids of rows of the vocabulary."""
    return [int(one) for one in work.vocab.decode(rows)]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_same_questions_in_the_same_order(both: tuple[Work, Work], split: str) -> None:
    words, rows = both
    assert words.text is not None
    for example in examples_of(words, split):
        user = words.users["user_id"][int(example["user_index"])]
        mine = [one for one in examples_of(rows, split) if rows.users["user_id"][int(one["user_index"])] == user]
        asked = words.text.decode(example["suffixes"] - 2)
        named = [int(part.split("x]")[0]) for part in asked.split("Film ")[1:]]
        assert [ids(rows, one["items"])[0] for one in mine] == named
        assert [int(one["labels"][0]) for one in mine] == example["labels"].tolist()
    assert len(list(examples_of(rows, split))) == sum(len(one["labels"]) for one in examples_of(words, split))


def test_training_rows_are_all_that_was_rated_in_the_training_period(both: tuple[Work, Work]) -> None:
    rows, log = both[1], tables().interactions
    found = [ids(rows, one["items"])[0] for one in examples_of(rows, "train")]
    held = [ids(rows, one["items"])[0] for one in examples_of(rows, "valid")]
    first_held = log.filter(pl.col("item_id").is_in(held))["timestamp"].min()
    trained = log.filter(pl.col("item_id").is_in(found))
    assert trained["timestamp"].max() < first_held and trained["rating"].is_not_nan().all()
    left = log.filter((pl.col("timestamp") < trained["timestamp"].max()) & pl.col("rating").is_not_nan())
    assert set(left["item_id"]) <= set(found)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_histories_end_before_what_is_asked_first(both: tuple[Work, Work], split: str) -> None:
    rows, log = both[1], tables().interactions
    of = dict(zip(log["item_id"].to_list(), zip(log["user_id"], log["timestamp"], strict=True), strict=True))
    asked: dict[int, list[tuple[int, int]]] = {}
    for one in examples_of(rows, split):
        item = ids(rows, one["items"])[0]
        user, when = of[item]
        asked.setdefault(user, []).append((when, np.count_nonzero(one["codes"][2:])))
    for user, found in asked.items():
        first = min(when for when, _ in found)
        for when, length in found:
            end = when if split == "train" else first
            assert length == min(50, log.filter((pl.col("user_id") == user) & (pl.col("timestamp") < end)).height)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="draws no rows"):
        dataclasses.replace(TASK, negatives=2)
    bare = dataclasses.replace(tables(), interactions=tables().interactions.drop("timestamp"))
    with pytest.raises(DataError, match="need times"):
        TASK.work_on(bare)
