"""Examples that say which of their events are predicted: the weights in batches, packed or not, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError
from recjax.data.examples import Examples, write_examples
from recjax.data.pipeline import Feed, train_batches
from recjax.data.record import Column, Field
from recjax.data.tokens import AtomicIds
from recjax.data.vocab import ItemVocab

LENGTHS = np.random.default_rng(0).integers(2, 20, 60)
FEED = Feed(batch_size=4, row_length=24, history_length=20, block=64)


def write(path: Path, *, loss: bool = True, longest: int = 0) -> Examples:
    """Examples in which every item is another row; with `loss`, items of a row divisible by 3 are predicted."""
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    items = np.arange(2, 2 + offsets[-1], dtype=np.int32)
    fields = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
    columns = {"user_index": Column(np.arange(len(LENGTHS))), "items": Column(items, offsets)}
    if loss:
        fields.append(Field(name="loss", dtype="int32", rank=1))
        columns["loss"] = Column((items % 3 == 0).astype(np.int32), offsets)
    frame = pl.DataFrame({"row": [2], "item_id": [0], "train_count": [1]})
    vocab = ItemVocab(tuple(map(str, range(2000))))
    facts = {"content_hash": path.name, "task": path.name, "longest_whole": longest}
    with write_examples(path, vocab=vocab, items=frame, users=frame, facts=facts) as writer:
        writer.add("train", fields, columns)
    return Examples.open(path)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return write(tmp_path_factory.mktemp("prepared") / "masked")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return write(tmp_path_factory.mktemp("prepared") / "plain", loss=False)


@pytest.mark.parametrize(
    "feed",
    [
        FEED,
        dataclasses.replace(FEED, pack=False),
        dataclasses.replace(FEED, history="chunk", history_length=7),
        dataclasses.replace(FEED, history="tile", history_length=7, context=2),
        dataclasses.replace(FEED, history="subsample", history_length=7),
        dataclasses.replace(FEED, memory_gib=0.0),  # read from disk
    ],
)
def test_weights_are_the_loss_of_what_is_predicted(feed: Feed, masked: Examples, plain: Examples) -> None:
    found, other = (train_batches([one], [1.0], feed, seed=3) for one in (masked, plain))
    for _ in range(12):
        one, two = next(found), next(other)
        is_predicted = (two["weight"] > 0) & (two["target_ids"] % 3 == 0)
        np.testing.assert_array_equal(one["weight"], is_predicted)
        np.testing.assert_array_equal(one["target_ids"], np.where(is_predicted, two["target_ids"], 0))
        for name in ("history_ids", "positions", "segment_ids"):
            np.testing.assert_array_equal(one[name], two[name])
    assert 0 < one["weight"].sum() < two["weight"].sum()


def test_a_mixture_may_have_tasks_with_and_without(masked: Examples, plain: Examples) -> None:
    found = train_batches([masked, plain], [1.0, 1.0], FEED, seed=0)
    kinds = {True: 0, False: 0}
    for _ in range(20):
        batch = next(found)
        for row in range(FEED.batch_size):
            for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                mine = batch["segment_ids"][row] == segment
                targets, weight = batch["history_ids"][row, mine] + 1, batch["weight"][row, mine]
                is_masked = not weight.all()
                np.testing.assert_array_equal(weight, targets % 3 == 0 if is_masked else np.ones_like(weight))
                kinds[is_masked] += 1
    assert min(kinds.values()) > 20


def test_examples_that_make_sense_as_a_whole_are_not_cut(tmp_path: Path) -> None:
    longest = int(LENGTHS.max())
    examples = write(tmp_path / "whole", longest=longest)
    train_batches([examples], [1.0], dataclasses.replace(FEED, history_length=longest - 1), seed=0).close()
    with pytest.raises(ConfigError, match=f"examples of {longest} tokens would be cut(.|\n)*at least {longest - 1}"):
        train_batches([examples], [1.0], dataclasses.replace(FEED, history_length=longest - 2), seed=0)


def test_texts_are_in_tokens_already(masked: Examples) -> None:
    with pytest.raises(ConfigError, match="cannot be spelled in other tokens"):
        train_batches([masked], [1.0], FEED, seed=0, tokens=AtomicIds().make([masked]))
