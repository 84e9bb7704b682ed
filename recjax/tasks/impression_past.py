"""What was known before each row of a log, as columns: counts, rates and histories of strictly earlier events.

An event is a row that was logged, never one that was drawn as a negative, and with `Impressions.events` "train" one of
the training split alone, so that no held-out label is ever part of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.counters import DAY, Counter, counts_before, history_before
from recjax.data.fields import PRESENT
from recjax.data.raw import Raw
from recjax.data.record import spans
from recjax.tasks.impression_rows import TRAIN, Rows, times_of
from recjax.tasks.impressions import Impressions

Columns = dict[str, Raw]


def earlier(task: Impressions, frame: pl.DataFrame, rows: Rows, columns: Columns) -> Columns:
    """The columns of the task's counters and histories for `rows` of the log `frame`, whose other columns are
    `columns`. Raises `DataError` where there are no times, or a column is not there."""
    if not task.counters and not task.histories:
        return {}
    times = times_of(frame, "Impressions.counters and histories")[rows.log]
    events = (rows.item < 0) & ((rows.part == TRAIN) | (task.events == "all"))
    heads, found = list(task.rules), {}
    for counter in task.counters:
        keys = _keys([_named(columns, name, "Counter.columns") for name in counter.columns])
        found |= _counted(counter, heads, rows.labels, keys, times, events)
    for history in task.histories:
        keys = _keys([_named(columns, history.user, "History.user")])
        item = _named(columns, history.item, "History.item")
        mine = events & (keys >= 0) & ~item.missing
        if history.head:
            mine &= rows.labels[:, heads.index(history.head)] >= 0.5
        begin, length, order = history_before((keys[mine], times[mine]), (keys, times), history.limit)
        values = item.values[np.flatnonzero(mine)[order]][spans(begin, length)]
        offsets = np.concatenate([np.zeros(1, np.int64), length.cumsum()])
        found[history.column] = Raw(values, np.zeros(len(keys), bool), offsets)
    return found


def _counted(
    counter: Counter, heads: Sequence[str], labels: np.ndarray, keys: np.ndarray, times: np.ndarray, events: np.ndarray
) -> Columns:
    """The columns of one counter; missing where a key is."""
    amounts = np.concatenate([np.ones((len(times), 1)), labels >= 0, np.maximum(labels, 0)], axis=1)
    window = {"window": counter.days * DAY, "delay": counter.delay}

    def before(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events, and for each head those with a label and the sum of these labels."""
        mine = events & (keys >= 0)
        sums = counts_before((keys[mine], times[mine]), amounts[mine], (keys, times), **window)
        known, positive = np.split(sums[:, 1:], 2, axis=1)
        return sums[:, 0], known, positive

    count, shown, positive = before(keys)
    _, shown_to_all, positive_of_all = before(np.zeros(len(keys), np.int64))
    rate = (positive_of_all + 1) / (shown_to_all + 2)
    share = (positive + counter.prior * rate) / (shown + counter.prior)
    found = {f"{counter.name}.count": Raw(count, keys < 0)}
    return found | {f"{counter.name}.{head}": Raw(share[:, k], keys < 0) for k, head in enumerate(heads)}


def _named(columns: Mapping[str, Raw], name: str, where: str) -> Raw:
    column = columns.get(name)
    if column is None or column.offsets is not None:
        known = ", ".join(sorted(n for n, c in columns.items() if c.offsets is None and not n.endswith(PRESENT)))
        raise DataError(f"there is no column {name} of single values", where=where, expected=f"one of {known}")
    return column


def _keys(columns: Sequence[Raw]) -> np.ndarray:
    """int64 [n]: numbers of the values of all columns together, -1 where one is missing."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        codes, texts = column.keys
        numbers = np.unique(numbers * (len(texts) + 1) + codes, return_inverse=True)[1]
    return np.where(np.logical_or.reduce([c.missing for c in columns]), -1, numbers)
