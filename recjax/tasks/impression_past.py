"""What was known before each row of a log, as columns: counts, rates and histories of strictly earlier events.

An event is a row that was logged, never one that was drawn as a negative, and with `Impressions.events` "train" one of
the training split alone, so that no held-out label is ever part of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.counters import DAY, Counter, counts_before, history_before
from recjax.data.fields import PRESENT
from recjax.data.raw import Raw
from recjax.data.record import spans
from recjax.data.snapshots import Snapshot, key_texts
from recjax.tasks.impression_rows import TRAIN, Rows, times_of
from recjax.tasks.impressions import Impressions

Columns = dict[str, Raw]


@dataclass(frozen=True)
class _Log:
    """All rows of a task: their columns, times and labels, and which of them are events."""

    columns: Columns
    times: np.ndarray
    labels: np.ndarray
    is_event: np.ndarray
    heads: Sequence[str]


def past(task: Impressions, frame: pl.DataFrame, rows: Rows, columns: Columns) -> tuple[Columns, tuple[Snapshot, ...]]:
    """The columns of the task's counters and histories for `rows` of the log `frame`, whose other columns are
    `columns`, and what they are once the log has ended.

    Raises `DataError` where there are no times, or a column is not there.
    """
    if not task.counters and not task.histories:
        return {}, ()
    times = times_of(frame, "Impressions.counters and histories")[rows.log]
    is_event = (rows.item < 0) & ((rows.part == TRAIN) | (task.events == "all"))
    found, snapshots = {}, []
    for one in (*task.histories, *task.counters):  # which may count by what a history says
        log = _Log({**columns, **found}, times, rows.labels, is_event, list(task.rules))
        on = one.columns if isinstance(one, Counter) else (one.user,)
        parts = [_named(log.columns, name, f"{type(one).__name__}") for name in on]
        keys = _keys(parts)
        tell = _counted if isinstance(one, Counter) else _remembered
        found |= tell(one, log, keys, keys, times)
        met, first = np.unique(keys[is_event & (keys >= 0)], return_index=True)
        texts = key_texts([part.take(np.flatnonzero(is_event & (keys >= 0))[first]) for part in parts])
        asked = np.append(met, keys.max(initial=0) + 1)  # the last key has no event
        ended = np.full(len(asked), times[is_event].max(initial=0) + 1)
        snapshots.append(Snapshot(tuple(on), tuple(map(str, texts)), tell(one, log, keys, asked, ended)))
    return found, tuple(snapshots)


def _counted(counter: Any, log: _Log, keys: np.ndarray, asked: np.ndarray, when: np.ndarray) -> Columns:
    """The columns of a counter for keys `asked` at times `when`; missing where a key is."""
    amounts = np.concatenate([np.ones((len(keys), 1)), log.labels >= 0, np.maximum(log.labels, 0)], axis=1)
    window = {"window": counter.days * DAY, "delay": counter.delay}

    def before(keys: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events, and for each head those with a label and the sum of these labels."""
        mine = log.is_event & (keys >= 0)
        sums = counts_before((keys[mine], log.times[mine]), amounts[mine], (asked, when), **window)
        known, positive = np.split(sums[:, 1:], 2, axis=1)
        return sums[:, 0], known, positive

    count, shown, positive = before(keys, asked)
    _, shown_to_all, positive_of_all = before(np.zeros_like(keys), np.zeros_like(asked))
    rate = (positive_of_all + 1) / (shown_to_all + 2)
    share = (positive + counter.prior * rate) / (shown + counter.prior)
    found = {f"{counter.name}.count": Raw(count, asked < 0)}
    return found | {f"{counter.name}.{head}": Raw(share[:, k], asked < 0) for k, head in enumerate(log.heads)}


def _remembered(history: Any, log: _Log, keys: np.ndarray, asked: np.ndarray, when: np.ndarray) -> Columns:
    """The column of a history for keys `asked` at times `when`; missing where a key is."""
    item = _named(log.columns, history.item, "History")
    mine = log.is_event & (keys >= 0) & ~item.missing
    if history.head:
        mine &= log.labels[:, log.heads.index(history.head)] >= 0.5
    begin, length, order = history_before((keys[mine], log.times[mine]), (asked, when), history.limit)
    items = item.values[np.flatnonzero(mine)[order]]
    if history.single:
        missing = (asked < 0) | (length == 0)
        last = np.where(missing, 0, begin + length - 1)
        return {history.column: Raw(items[last] if len(items) else np.zeros(len(asked), items.dtype), missing)}
    chosen, offsets = spans(begin, length), np.concatenate([np.zeros(1, np.int64), length.cumsum()])
    found = {history.column: Raw(items[chosen], asked < 0, offsets)}
    for name, source in history.beside.items():
        more = _named(log.columns, source, "History.beside")
        codes, texts = more.keys
        told = np.array([*texts, ""], object)[np.where(more.missing, len(texts), codes)]
        found[name] = Raw(told[np.flatnonzero(mine)[order][chosen]], asked < 0, offsets)
    return found


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
