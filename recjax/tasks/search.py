"""Find items for a query: the search half of systems that search and recommend with one model.

One example per pair of a query and an item that is relevant to it. Its items are the rows of a next-item task over the
same data, so that both can be trained as one mixture. Only the settings are here; `search_work.py` does the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recjax.core.errors import ConfigError
from recjax.data.sources import DataDir
from recjax.data.text import TextConfig
from recjax.tasks.next_item import NAME, NextItem
from recjax.tasks.work import Work

SPLITS = ("pair", "query", "given")


@dataclass(frozen=True, kw_only=True)
class Search:
    """Search over the queries and relevance of a data directory.

    `log` is the next-item task whose data, item vocabulary and held-out events this one shares. `text` is the text
    vocabulary, and `prompt` what is put in front of every query.

    A judged pair counts as relevant from the label `min_label` on; `labels` says what labels that are words count as,
    such as {"Exact": 3}. Queries that are spelt alike, but for case and
    spaces, are one query. `split` is "pair" (each pair of a query and an item is held out by a hash of the two ids, so
    that a query has training pairs as a rule), "query" (by a hash of the query, so that held-out queries are new) or
    "given" (the column split of the relevance table: train, valid or test); `seed` changes the hashes. No more than
    `per_item` training pairs of an item are kept, chosen by hash; those of a lower limit are among those of a higher.

    With `drop_leaks` what users did in the events that `log` holds out is not trained on: where relevance has a
    column user_id, a judgment by a user on an item of the user's own held-out events makes no training pair. The pair
    stays when another judgment, by someone else or by nobody in particular, gives it as well.
    """

    log: NextItem = field(default_factory=NextItem)
    text: TextConfig = field(default_factory=TextConfig)
    prompt: str = ""
    split: str = "pair"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    min_label: float = 1.0
    labels: Mapping[str, float] = field(default_factory=dict)
    per_item: int | None = None
    drop_leaks: bool = True
    seed: int = 0
    name: str = "search"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"Search.name = {self.name!r}", expected="letters, digits, _ and . only")
        if self.split not in SPLITS:
            raise ConfigError(f"Search.split = {self.split!r}", expected=" or ".join(map(repr, SPLITS)))
        fractions = (self.valid_fraction, self.test_fraction)
        if not all(math.isfinite(f) and f >= 0 for f in fractions) or sum(fractions) >= 1:
            raise ConfigError(
                f"Search.valid_fraction, test_fraction = {fractions}", expected="at least 0, together below 1"
            )
        if math.isnan(self.min_label):
            raise ConfigError(f"Search.min_label = {self.min_label}", expected="a number")
        if self.per_item is not None and self.per_item < 1:
            raise ConfigError(f"Search.per_item = {self.per_item}", expected="at least 1, or None for no limit")

    @property
    def data(self) -> DataDir:
        """The data of the log."""
        return self.log.data

    def work(self) -> Work:
        """Read and divide the data (`search_work.py`).

        Raises `DataError` when there are no queries or judgments, nothing is left to train on, or the log is unusable.
        """
        return self.work_on(self.data.load())

    def work_on(self, tables: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.search_work import make_work

        return make_work(self, tables)
