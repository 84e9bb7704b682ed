"""What was known of a key before a row: counts, rates and histories from strictly earlier events.

A feature that counts events leaks where it counts those of the row itself or of later ones. Here a row at time t sees
the events of its key with a time before t, never one at t, so that whatever happens at t or later changes nothing. All
in sorted arrays: the cost is that of a sort, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.identity import LATER

DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Counts by the values of `columns` together, in the last `days` days before a row (0: all before it), and not in
    the `delay` seconds right before it, for labels that come late.

    Makes the columns `<name>.count` and, for each head, `<name>.<head>`: the share of positives, which `prior` events
    of the rate of all keys by then are added to. The name is that of the columns, joined with "_x_", and `.<n>d`.
    """

    columns: Sequence[str]
    days: float = 0.0
    delay: int = 0
    prior: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", (self.columns,) if isinstance(self.columns, str) else tuple(self.columns))
        if not self.columns:
            raise ConfigError("Counter of no column", where="Counter.columns")
        if min(self.days, self.delay) < 0 or self.prior <= 0:
            raise ConfigError(
                f"Counter.days, delay, prior = {self.days}, {self.delay}, {self.prior}",
                expected="days and delay of at least 0, a prior above 0",
            )

    @property
    def name(self) -> str:
        return "_x_".join(self.columns) + (f".{self.days:g}d" if self.days else "")


@dataclass(frozen=True, kw_only=True)
class History:
    """The column `column`: the `item`s of the last `limit` events of the same `user` before a row, oldest first; only
    positives of `head` where one is named.

    With `single` it is not a list but the last one alone, missing where there is none; counters may go by it, and then
    say what followed it how often: a recommender by Markov chain that has seen nothing but earlier events.

    `beside` names further columns, and which columns of the log they are made of: what else is known of the same
    events, such as what was done with the items, place by place; an empty text where it is missing.
    """

    column: str = "history"
    item: str = "item_id"
    user: str = "user_id"
    head: str = ""
    limit: int = 50
    single: bool = False
    beside: Mapping[str, str] = field(default_factory=dict, metadata={LATER: True})

    def __post_init__(self) -> None:
        if self.single and self.beside:
            raise ConfigError("a single event has nothing beside it", where="History.single, History.beside")
        if self.limit < 1 or (self.single and self.limit > 1):
            expected = "1 of a single one" if self.single else "at least 1"
            raise ConfigError(f"History.limit = {self.limit}", expected=expected)


class Events:
    """Events by key (int64 >= 0) and time, in order; events of one key and time keep the order they are given in."""

    def __init__(self, keys: np.ndarray, times: np.ndarray) -> None:
        self.order = np.lexsort((times, keys))
        self._moments = np.unique(times)
        self._codes = self._code(keys[self.order], np.searchsorted(self._moments, times[self.order]))

    def before(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """int64: how many events in `order` come before the first of each key that is not earlier than its time."""
        return np.searchsorted(self._codes, self._code(keys, np.searchsorted(self._moments, times)))

    def first(self, keys: np.ndarray) -> np.ndarray:
        """int64: the place of the first event of each key."""
        return np.searchsorted(self._codes, self._code(keys, np.zeros(len(keys), np.int64)))

    def _code(self, keys: np.ndarray, moments: np.ndarray) -> np.ndarray:
        return keys.astype(np.int64) * (len(self._moments) + 1) + moments


def counts_before(
    events: tuple[np.ndarray, np.ndarray],
    amounts: np.ndarray,
    asked: tuple[np.ndarray, np.ndarray],
    *,
    window: float = 0.0,
    delay: int = 0,
) -> np.ndarray:
    """float64 [q, m]: for each (key, time) asked, sums of the `amounts` [n, m] of earlier events of the key.

    Earlier is a time below t - `delay` and, with a `window`, not below t - `window`. `events` and `asked` are pairs of
    keys and times.
    """
    found = Events(*events)
    sums = np.concatenate([np.zeros((1, amounts.shape[1])), np.cumsum(amounts[found.order], axis=0, dtype=np.float64)])
    keys, times = asked
    end = found.before(keys, times - delay)
    start = found.before(keys, times - int(window)) if window else found.first(keys)
    return sums[np.maximum(end, start)] - sums[start]


def history_before(
    events: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray], limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each (key, time) asked, its last `limit` earlier events: where they begin in an order of the events, how many
    there are, and that order."""
    found = Events(*events)
    end = found.before(*asked)
    start = np.maximum(found.first(asked[0]), end - limit)
    return start, end - start, found.order
