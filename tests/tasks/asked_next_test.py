"""What is asked about next items, for a model of ids: the same users, candidates and events as in the prompt."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError
from recjax.data.tables import Tables
from recjax.prompts.fields import Entity, Field
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.tasks.asked_next import AskedNext
from recjax.tasks.prompted import Periods, Told, Wording
from recjax.tasks.prompted_ranking import WatchNext
from recjax.tasks.work import Work, examples_of

DAY = 86_400
WORDING = Wording(tokenizer=TokenizerConfig(size=600), items=Entity(fields=(Field(name="title", label=""),)))
ASKED = WatchNext(
    told=Told(wording=WORDING, periods=Periods(valid_fraction=0.15, test_fraction=0.2, gap_days=5)),
    candidates=6,
    history=50,
)
TASK = AskedNext(asked=ASKED)


def tables() -> Tables:
    """Users who come at any time, some of them late; several events of a user on a day."""
    rng = np.random.default_rng(4)
    user = rng.integers(0, 30, 500)
    day = np.maximum(rng.integers(0, 80, 500), user * 2)  # the last users have no event in training
    frame = pl.DataFrame({"user_id": user, "item_id": rng.integers(0, 60, 500), "timestamp": day * DAY})
    frame = frame.sort(["user_id", "timestamp"], maintain_order=True)
    items = pl.DataFrame({"item_id": np.arange(70)[::-1], "title": [f"Film {k}x" for k in range(70)][::-1]})
    return Tables(interactions=frame.with_columns(order=pl.int_range(pl.len()).over("user_id")), items=items)


@pytest.fixture(scope="module")
def both() -> tuple[Work, Work]:
    """What is asked in words, and of a model of sequences."""
    return ASKED.work_on(tables()), TASK.work_on(tables())


def item_ids(work: Work, rows: np.ndarray) -> list[int]:
    """Item ids of rows of the vocabulary."""
    return [int(str(one)) for one in work.vocab.decode(rows)]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_same_users_are_asked_about_the_same_items(both: tuple[Work, Work], split: str) -> None:
    words, ids = both
    assert words.text is not None
    mine = {ids.users["user_id"][int(e["user_index"])]: e for e in examples_of(ids, split)}
    asked = 0
    for example in examples_of(words, split):
        found = mine.pop(words.users["user_id"][int(example["user_index"])])
        said = words.text.decode(example["suffixes"] - 2)
        named = [int(part.split("x]")[0]) for part in said.split("Film ")[1:]]
        assert item_ids(ids, found["asked"]) == named
        assert found["asked"][0] == found["label"] and example["labels"].tolist() == [1, 0, 0, 0, 0, 0]
        asked += 1
    assert not mine and asked > 10


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_history_has_all_events_before_the_day_that_is_asked_about(both: tuple[Work, Work], split: str) -> None:
    log = tables().interactions
    for example in examples_of(both[1], split):
        user = both[1].users["user_id"][int(example["user_index"])]
        before = log.filter((pl.col("user_id") == user) & (pl.col("timestamp") < int(example["label_time"])))
        assert item_ids(both[1], example["items"]) == before["item_id"].to_list()
        assert len(example["times"]) == before.height >= 1


def test_training_ends_with_its_period(both: tuple[Work, Work]) -> None:
    first_asked = min(int(e["label_time"]) for e in examples_of(both[1], "valid"))
    assert max(e["times"].max() for e in examples_of(both[1], "train")) < first_asked


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="min_history = 0"):
        AskedNext(asked=dataclasses.replace(ASKED, min_history=0))
    with pytest.raises(ConfigError, match="k_core = 3"):
        AskedNext(asked=ASKED, k_core=3)
