"""Batches of items: the feed of models that are about the catalogue rather than about its users.

A sibling of `recjax.data.pipeline.Feed`: an endless stream that goes through all items in an order of its own each
epoch, whose position is one number (`recjax.data.position`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.batch import Batch
from recjax.data.hashing import permutation
from recjax.data.heldout import process_rows
from recjax.data.position import Counted, OneSlot, Rounds
from recjax.data.vocab import FIRST_ITEM, ItemVocab

_ORDER = 0x6974656D  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class CatalogueFeed(OneSlot):
    """`batch_size` items a step, over all devices; every item once an epoch."""

    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"CatalogueFeed.batch_size = {self.batch_size}", expected="at least 1")


class CatalogueBatches(Counted):
    """This process's part of the batches: `item_ids` int32 [b] and `weight` float32 [b]."""

    unit, other = "items", "another catalogue or seed"

    def __init__(
        self, vocab: ItemVocab, feed: CatalogueFeed, *, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        super().__init__(f"{vocab.hash}-{seed}")
        self._size, self._rows = feed.batch_size, process_rows(feed.batch_size, process_index, process_count)
        self._items = Rounds(vocab.num_items, lambda epoch: permutation(vocab.num_items, seed, _ORDER, epoch))

    def __next__(self) -> Batch:
        items = self._items.at(self._position + np.arange(self._rows.start, self._rows.stop))
        self._position += self._size
        return {"item_ids": (FIRST_ITEM + items).astype(np.int32), "weight": np.ones(len(items), np.float32)}

    @property
    def epochs(self) -> list[float]:
        """How often the catalogue has been gone through."""
        return [self._position / len(self._items)]

    @property
    def epoch_targets(self) -> list[int]:
        """Items of an epoch."""
        return [len(self._items)]

    unique_targets = epoch_targets
