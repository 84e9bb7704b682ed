"""Other questions to ask of held-out records: pure functions from the records of a split to changed records.

A record is one user: what came before (`items`, `times`), the held-out `label` with its `label_time`, and, in splits
that hold out a whole period, all its items as `future`, the label first. A view that changes what the model is shown
keeps what the user really had as `seen`, so that the same items stay out of the ranking and only the input differs.
Whatever is drawn depends on the seed, the user's number and the place of the event alone.
"""

from __future__ import annotations

import numpy as np

from recjax.data.candidates import below, share
from recjax.data.record import Column, Columns, spans
from recjax.data.vocab import FIRST_ITEM

_BY_EVENT = ("items", "times")
_DELETE, _REPLACE, _ITEM, _PLACE = range(4)


def take(records: Columns, users: np.ndarray) -> Columns:
    """Some of the records, in the order given."""
    return {name: _rows(column, users) for name, column in records.items()}


def latest(records: Columns, count: int) -> Columns:
    """Histories cut to their last `count` events, as those of users who have just arrived."""
    lengths = records["items"].lengths
    return _kept(records, _from_end(lengths) < count)


def deleted(records: Columns, rate: float, seed: int) -> Columns:
    """Each event of the histories left out with probability `rate`; a higher rate leaves out the same and more."""
    user, place = _events(records)
    return _kept(records, share(seed, _DELETE, user, place) >= rate)


def replaced(records: Columns, rate: float, rows: slice, seed: int) -> Columns:
    """Each item of the histories replaced with probability `rate` by one drawn uniformly from `rows`."""
    user, place = _events(records)
    items = _flat(records["items"])
    chosen = share(seed, _REPLACE, user, place) < rate
    drawn = rows.start + below(rows.stop - rows.start, seed, _ITEM, user, place)
    offsets = np.concatenate([[0], np.cumsum(records["items"].lengths)])
    changed = Column(np.where(chosen, drawn, items).astype(np.int32), offsets)
    return {**records, "items": changed, "seen": records.get("seen", records["items"])}


def older(records: Columns, recent: int, seed: int) -> Columns:
    """A random event of the training log as target, one that is not among the user's last `recent` training events.

    The history is what came before it. The item is in the training log: the question is how well older behaviour is
    still modelled, not how well it generalises. Users without such an event, or whose event is an unknown item, are
    left out.
    """
    room = records["train_events"].values.astype(np.int64) - recent - 1  # places 1 .. room may be taken
    users = np.flatnonzero(room >= 1)
    place = 1 + below(room[users], seed, _PLACE, records["user_index"].values[users])
    starts = _offsets(records["items"])[users]
    label = _flat(records["items"])[starts + place]
    known = label >= FIRST_ITEM
    users, place, starts, label = users[known], place[known], starts[known], label[known]
    changed = {name: c for name, c in take(records, users).items() if name not in ("seen", "future", "future_times")}
    changed["label"] = Column(label.astype(np.int32))
    for name in _BY_EVENT:
        if name in records:
            values = _flat(records[name])
            changed[name] = Column(values[spans(starts, place)], np.concatenate([[0], np.cumsum(place)]))
    if "times" in records:
        changed["label_time"] = Column(_flat(records["times"])[starts + place])
    return changed


def after(records: Columns, step: int, shown: Column | None = None) -> Columns:
    """The record as it stands `step` events into the held-out period, with event number `step` of it as label.

    What happened before that step in the period is added to the history, or, with `shown` (lists of at least `step`
    rows, one for each record), those rows instead, at the same times: a trajectory that the model made up. Users
    whose period is shorter, or whose label is an unknown item, are left out.
    """
    future = records["future"]
    users = np.flatnonzero(future.lengths > step)
    at = _offsets(future)[users]
    users = users[_flat(future)[at + step] >= FIRST_ITEM]
    changed, future = dict(take(records, users)), _rows(future, users)
    changed["label"] = Column(_flat(future)[_offsets(future)[:-1] + step].astype(np.int32))
    steps = np.full(len(users), step)
    if "times" in records:
        times = _rows(records["future_times"], users)
        changed["label_time"] = Column(_flat(times)[_offsets(times)[:-1] + step])
        changed["times"] = _joined(changed["times"], _head(times, steps))
    added = _head(future if shown is None else _rows(shown, users), steps)
    changed["items"] = _joined(changed["items"], added)
    if "seen" in changed:
        changed["seen"] = _joined(changed["seen"], added)
    return changed


def _events(records: Columns) -> tuple[np.ndarray, np.ndarray]:
    """User number and place, counted from the latest, of every event of the histories."""
    lengths = records["items"].lengths
    return np.repeat(records["user_index"].values, lengths), _from_end(lengths)


def _from_end(lengths: np.ndarray) -> np.ndarray:
    return np.repeat(lengths, lengths) - 1 - spans(np.zeros(len(lengths), np.int64), lengths)


def _kept(records: Columns, keep: np.ndarray) -> Columns:
    """Histories with only the events that `keep` marks."""
    lengths = records["items"].lengths
    user = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user[keep], minlength=len(lengths)))])
    changed = {name: Column(_flat(records[name])[keep], offsets) for name in _BY_EVENT if name in records}
    return {**records, **changed, "seen": records.get("seen", records["items"])}


def _flat(column: Column) -> np.ndarray:
    """The values of all lists, one after the other."""
    assert column.offsets is not None
    return column.values[column.offsets[0] : column.offsets[-1]]


def _offsets(column: Column) -> np.ndarray:
    """Bounds of the lists in `_flat`."""
    return np.concatenate([[0], np.cumsum(column.lengths)])


def _rows(column: Column, users: np.ndarray) -> Column:
    if column.offsets is None:
        return Column(column.values[users])
    lengths = column.lengths[users]
    return Column(column.values[spans(column.offsets[users], lengths)], np.concatenate([[0], np.cumsum(lengths)]))


def _head(column: Column, counts: np.ndarray) -> Column:
    """The first so many values of each list."""
    return Column(_flat(column)[spans(_offsets(column)[:-1], counts)], np.concatenate([[0], np.cumsum(counts)]))


def _joined(one: Column, other: Column) -> Column:
    """The lists of `one`, each followed by that of `other`."""
    offsets = np.concatenate([[0], np.cumsum(one.lengths + other.lengths)])
    values = np.empty(offsets[-1], one.values.dtype)
    values[spans(offsets[:-1], one.lengths)] = _flat(one)
    values[spans(offsets[:-1] + one.lengths, other.lengths)] = _flat(other)
    return Column(values, offsets)
