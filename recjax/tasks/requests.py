"""Rows of requests: search, similar items and pages as one task over one log, for a ranker that answers all of them.

An `Impressions` task whose rows are made of the events and judgments of a data directory (`data/requests_log.py`):
every row is a positive, and negatives are drawn for it. What is missing in a kind of request (the query of a page, the
source of a search) is missing in its rows too, for `imputation` to fill in or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recjax.core.errors import ConfigError
from recjax.data.identity import LATER
from recjax.data.imputation import UNICORN, Impute
from recjax.data.ranker_features import Join
from recjax.data.requests_log import APART, ASKER, KINDS, TASK
from recjax.tasks.impressions import Impressions
from recjax.tasks.work import Work


@dataclass(frozen=True, kw_only=True)
class Requests(Impressions):
    """Requests of these `kinds`: columns user_id, item_id, task, query, source_id; and those that are joined.

    With `clusters` above 0 users have a column cluster, joined as user_cluster: one of so many groups that they fall
    into by what they had before the first held-out row (`data/user_clusters.py`), missing for those who had nothing.
    `min_label` is from what label on a judgment is a request. A share `keys` of the searches is asked while the query
    is being typed, by its beginning. A negative is an item that the user, or for a search the
    query, has nothing to do with in the log.
    """

    kinds: Sequence[str] = KINDS
    clusters: int = 0
    min_label: float = 1.0
    keys: float = field(default=0.0, metadata={LATER: True})
    labels: Mapping[str, str] = field(default_factory=lambda: {"engaged": "1"})
    joins: Sequence[Join] = (
        Join(table="items", key="item_id"),
        Join(table="items", key="source_id", prefix="source_"),
        Join(table="users", key="user_id", prefix="user_"),
    )
    imputation: Sequence[Impute] = UNICORN
    negatives: int = 4
    held_negatives: int | None = 99
    negative_power: float = 1.0
    negative_uniform: float = 0.5
    domain: str = TASK
    user: str = ASKER
    apart: str = APART
    name: str = "requests"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ConfigError(f"Requests.kinds = {self.kinds}", expected=f"some of {', '.join(KINDS)}")
        if self.clusters < 0:
            raise ConfigError(f"Requests.clusters = {self.clusters}", expected="at least 0")
        if not 0 <= self.keys <= 1:
            raise ConfigError(f"Requests.keys = {self.keys}", expected="0 to 1")

    def work(self) -> Work:
        """Read the log and its judgments, make requests of them, and encode these.

        Raises `DataError` when there are no times, or no queries to search with.
        """
        return self.work_on(self.data.load())

    def work_on(self, log: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.requests_work import make_work

        return make_work(self, log)
