"""The records of one split as flat arrays, the form that counting baselines want them in.

A prepared example is one user: the items so far and, outside the training split, a held-out label. Here they lie
one user after the other in one array, so that counting is numpy and scipy from end to end.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from recjax.data.examples import Examples
from recjax.data.record import spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """User u had the rows `items[offsets[u]:offsets[u + 1]]`, oldest first; `label` 0 where there is none."""

    items: np.ndarray
    offsets: np.ndarray
    user_index: np.ndarray
    label: np.ndarray
    train_events: np.ndarray

    @classmethod
    def of(cls, examples: Examples, split: str) -> Records:
        """Read a whole split of prepared examples; raises `ExamplesError` when there is no such split."""
        source = examples.source(split)
        names = [field.name for field in examples.schema(split)]
        found = source.read(np.arange(len(source)), [n for n in names if n != "times"])

        def column(name: str, dtype: type) -> np.ndarray:
            if name not in found:
                return np.zeros(len(source), dtype)
            values, at = found[name]
            return values[at].astype(dtype)

        lengths = source.lengths.astype(np.int64)
        items, begins = found["items"]
        return cls(
            items=items[spans(begins, lengths)].astype(np.int32),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            user_index=column("user_index", np.int64),
            label=column("label", np.int32),
            train_events=column("train_events", np.int32),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Events of every user."""
        return np.diff(self.offsets)

    def take(self, users: np.ndarray) -> Records:
        """The records of some users, in the order given."""
        lengths = self.lengths[users]
        return Records(
            items=self.items[spans(self.offsets[users], lengths)],
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            user_index=self.user_index[users],
            label=self.label[users],
            train_events=self.train_events[users],
        )

    def latest(self, limit: int) -> Records:
        """The same users with their last `limit` events only."""
        lengths = np.minimum(self.lengths, limit)
        return dataclasses.replace(
            self,
            items=self.items[spans(self.offsets[1:] - lengths, lengths)],
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        )

    def padded(self) -> np.ndarray:
        """int32 [n, longest]: every user's rows, 0 where padded; at least one column, a power of two of them."""
        longest = 1 << max(0, int(self.lengths.max(initial=1)) - 1).bit_length()
        out = np.zeros((len(self), longest), np.int32)
        out[np.repeat(np.arange(len(self)), self.lengths), spans(np.zeros(len(self), np.int64), self.lengths)] = (
            self.items
        )
        return out

    def weights(self, num_rows: int, *, limit: int, decay: float) -> sparse.csr_array:
        """float32 [n, num_rows]: `decay ** age` for the last `limit` events (age 0 is the last), repeats added up."""
        recent = self.latest(limit)
        users = np.repeat(np.arange(len(self)), recent.lengths)
        age = np.repeat(recent.offsets[1:], recent.lengths) - 1 - np.arange(len(recent.items))
        weight = np.power(np.float32(decay), age.astype(np.float32))
        return sparse.csr_array((weight, (users, recent.items)), shape=(len(self), num_rows))
