"""Predict a user's next item: the kind of task behind sequential recommenders.

One example per user, with all of the user's events before the split's end; how much of it a model sees at a time is
decided when feeding. Only the settings are here; `next_item_work.py` does the work.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from recjax.core.errors import ConfigError
from recjax.data.identity import LATER
from recjax.data.sources import DataDir
from recjax.tasks.work import Work

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")
_SPLITS = ("leave_one_out", "leave_last", "global_time", "given")
_CATALOGUES = ("interactions", "items")


@dataclass(frozen=True, kw_only=True)
class NextItem:
    """Next-item prediction over a data directory.

    `split` is "leave_one_out" (each user's last event for test, the one before for valid), "leave_last" (the first
    of each user's last `held_out` events for test, the event before it for valid), "global_time" (the last
    `test_fraction` of the events in time are the test period, the `valid_fraction` before them the valid period; the
    first event of a user in a period is the target) or "given" (the column split of the interactions says which events
    are train, valid and test; again a user's first event of a split is the target). A held-out example has as its
    `future` all events of the user from the target on that are held out with it. Users with fewer than `min_events`
    events are left out altogether.
    Before that, without `repeats` only the first event of a user with an item counts, and above 1 `k_core` leaves out
    users and items with fewer events than that, again and again until all that are left have as many.
    `catalogue` says which items can be recommended: those of the "interactions" or those of the "items" table.
    `facets` are columns of the items table that answers can be filtered by, besides `domain`: a word or a number for
    each item, or a list of them.
    """

    data: DataDir = field(default_factory=DataDir)
    split: str = "leave_one_out"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    held_out: int = 10
    min_events: int = 1
    catalogue: str = "interactions"
    repeats: bool = field(default=True, metadata={LATER: True})
    k_core: int = field(default=1, metadata={LATER: True})
    facets: tuple[str, ...] = field(default=(), metadata={LATER: True})
    name: str = "next_item"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"NextItem.name = {self.name!r}", expected="letters, digits, _ and . only")
        if self.split not in _SPLITS:
            raise ConfigError(f"NextItem.split = {self.split!r}", expected=" or ".join(map(repr, _SPLITS)))
        if self.catalogue not in _CATALOGUES:
            raise ConfigError(f"NextItem.catalogue = {self.catalogue!r}", expected=" or ".join(map(repr, _CATALOGUES)))
        fractions = (self.valid_fraction, self.test_fraction)
        if not all(math.isfinite(f) and f > 0 for f in fractions) or sum(fractions) >= 1:
            raise ConfigError(
                f"NextItem.valid_fraction, test_fraction = {fractions}", expected="above 0, together below 1"
            )
        object.__setattr__(self, "facets", tuple(self.facets))
        if bad := set(self.facets) & {"row", "item_id", "title", "train_count", "domain"}:
            raise ConfigError(
                f"NextItem.facets = {self.facets}", expected=f"columns other than {', '.join(sorted(bad))}"
            )
        for name in ("held_out", "min_events", "k_core"):
            if getattr(self, name) < 1:
                raise ConfigError(f"NextItem.{name} = {getattr(self, name)}", expected="at least 1")

    def work(self) -> Work:
        """Read and divide the data (`next_item_work.py`).

        Raises `DataError` when there is nothing to learn from, or what the split or catalogue needs is missing.
        """
        return self.work_on(self.data.load())

    def work_on(self, tables: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.next_item_work import make_work

        return make_work(self, tables)
