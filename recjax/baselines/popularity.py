"""Popularity: the same order for everybody, by the number of events in the training split.

What every other system has to beat first. Nothing is tuned.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from recjax.baselines.records import Records


@dataclasses.dataclass(frozen=True)
class Popularity:
    """`item_count` [v]: training events of every row."""

    item_count: np.ndarray

    @property
    def settings(self) -> dict[str, float]:
        """Nothing to choose."""
        return {}

    def scores(self, records: Records) -> np.ndarray:
        """float32 [n, v], a view of one row."""
        count = np.asarray(self.item_count, np.float32)
        return np.broadcast_to(count, (len(records), len(count)))
