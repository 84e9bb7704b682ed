"""Batches of items: the feed of models that are about the catalogue rather than about its users.

A sibling of `recjax.data.pipeline.Feed`: an endless stream that goes through all items in an order of its own each
epoch, whose position is one number, the same for any batch size and number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from recjax.core.errors import CheckpointError, ConfigError
from recjax.data.batch import Batch
from recjax.data.hashing import permutation
from recjax.data.heldout import process_rows
from recjax.data.vocab import FIRST_ITEM, ItemVocab

_ORDER = 0x6974656D  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class CatalogueFeed:
    """`batch_size` items a step, over all devices; every item once an epoch."""

    batch_size: int

    # As a feed of windows would say it: an item is a row of one slot, and there is no history.
    row_length: ClassVar[int] = 1
    history_length: ClassVar[int] = 1
    text_length: ClassVar[int] = 1
    times: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"CatalogueFeed.batch_size = {self.batch_size}", expected="at least 1")


class CatalogueBatches:
    """This process's part of the batches: `item_ids` int32 [b] and `weight` float32 [b]."""

    row_use = 1.0

    def __init__(
        self, vocab: ItemVocab, feed: CatalogueFeed, *, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        self._items, self._size, self._seed = vocab.num_items, feed.batch_size, seed
        self._rows = process_rows(feed.batch_size, process_index, process_count)
        self._identity = f"{vocab.hash}-{seed}"
        self._position, self._order = 0, (-1, np.empty(0, np.int64))

    def __iter__(self) -> CatalogueBatches:
        return self

    def __next__(self) -> Batch:
        places = self._position + np.arange(self._rows.start, self._rows.stop)
        self._position += self._size
        ids = np.empty(len(places), np.int32)
        for epoch in range(int(places[0]) // self._items, int(places[-1]) // self._items + 1):
            now = places // self._items == epoch
            ids[now] = FIRST_ITEM + self._order_of(epoch)[places[now] % self._items]
        return {"item_ids": ids, "weight": np.ones(len(ids), np.float32)}

    def get_state(self) -> dict[str, Any]:
        """How many items have been handed out."""
        return {"items": self._position, "identity": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises `CheckpointError` when the state belongs to another catalogue or seed."""
        if state.get("identity") != self._identity:
            raise CheckpointError(
                "the saved position belongs to another catalogue or seed",
                where=f"data position {state.get('identity')!r}",
                expected=repr(self._identity),
                mend="train with the recipe and data of the checkpoint, or start a new run",
            )
        self._position = int(state["items"])

    @property
    def epochs(self) -> list[float]:
        """How often the catalogue has been gone through."""
        return [self._position / self._items]

    @property
    def epoch_targets(self) -> list[int]:
        """Items of an epoch."""
        return [self._items]

    unique_targets = epoch_targets

    def close(self) -> None:
        """Nothing is held open."""

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = epoch, permutation(self._items, self._seed, _ORDER, epoch)
        return self._order[1]
