"""The tables of a data directory once read: what tasks, checks and baselines take as input.

Only the shape of the result lives here, so that the simulated world and the reader of files can both make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

TIE_RULE = "file order"


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A log of interactions and whatever describes its users, items and queries.

    `interactions` has user_id and item_id (Int64 or String), `order` (int64: 0, 1, 2, ... within each user, oldest
    first) and, when the log has times, `timestamp` (int64 seconds since 1970, UTC); all other columns are as in the
    file. Rows are sorted by user_id and then `order`; events of a user at the same time stay in file order.
    `items` has unique item_id, `users` unique user_id, `queries` unique query_id and text, `relevance` query_id,
    item_id and label; None where the directory has no such table. `vectors[name]` is (float array [n, width], the n
    item ids of its rows as an array).
    `notes` says what was understood, `warnings` what looked odd.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None
    queries: pl.DataFrame | None = None
    relevance: pl.DataFrame | None = None
    vectors: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    simulated: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def has_times(self) -> bool:
        return "timestamp" in self.interactions.columns
