"""The feed of items: every item once an epoch, from any position, in any number of slices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from recjax.core.errors import CheckpointError, ConfigError
from recjax.data.batch import check_fields
from recjax.data.catalogue import CatalogueBatches, CatalogueFeed
from recjax.data.vocab import FIRST_ITEM, ItemVocab

VOCAB = ItemVocab(tuple(f"item{i}" for i in range(10)))


def batches(size: int = 4, seed: int = 0, vocab: ItemVocab = VOCAB, **place: int) -> CatalogueBatches:
    return CatalogueBatches(vocab, CatalogueFeed(batch_size=size), seed=seed, **place)


def ids(feed: CatalogueBatches, count: int) -> list[int]:
    return [i for batch in itertools.islice(feed, count) for i in batch["item_ids"].tolist()]


@pytest.mark.parametrize("size", [1, 4, 7, 25])
def test_every_item_comes_once_an_epoch_in_another_order(size: int) -> None:
    got = ids(batches(size), 200 // size + 1)[:200]
    epochs = np.asarray(got).reshape(20, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(FIRST_ITEM, FIRST_ITEM + 10), (20, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 20
    assert got == ids(batches(3), 67)[:200] and got[:10] != ids(batches(1, seed=1), 10)


def test_slices_of_processes_make_the_batch() -> None:
    whole = list(itertools.islice(batches(6), 5))
    parts = [list(itertools.islice(batches(6, process_index=i, process_count=3), 5)) for i in range(3)]
    for step, batch in enumerate(whole):
        check_fields(batch)
        joined = np.concatenate([part[step]["item_ids"] for part in parts])
        np.testing.assert_array_equal(joined, batch["item_ids"])
        assert batch["item_ids"].dtype == np.int32 and batch["weight"].tolist() == [1] * 6


def test_it_goes_on_where_it_was_also_with_another_batch_size() -> None:
    first = batches(4)
    had = ids(first, 5)
    assert first.epochs == [2.0] and first.epoch_targets == first.unique_targets == [10]
    resumed = batches(2)
    resumed.set_state(first.get_state())
    assert had + ids(resumed, 10) == ids(batches(4), 10)
    for other in (batches(4, seed=1), batches(4, vocab=ItemVocab(("a", "b")))):
        with pytest.raises(CheckpointError, match="another catalogue"):
            other.set_state(first.get_state())


def test_a_batch_that_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="batch_size = 0"):
        CatalogueFeed(batch_size=0)
    with pytest.raises(ConfigError, match="cannot be divided"):
        batches(4, process_index=0, process_count=3)
