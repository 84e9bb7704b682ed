"""From a log to one history per user, and where to cut it into train, valid and test.

The log is sorted and grouped once (polars), and everything after that is arithmetic on lengths: a split is three
numbers per user. The same functions take one user's numbers or all users' at once.

Order and ties: a user's events are in the order that the data directory gives them (`order`: by time, then position,
then file order). `leave_one_out` therefore breaks ties by file order; for `global_time` an event at exactly the cut-off
time is after the cut-off.

What `leave_one_out` and `leave_last` do not promise: that no training event of another user is later than a test
event. Only `global_time` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.blocks import blocks, look_up

SPLITS = ("train", "valid", "test")
TIE_RULES = {
    "leave_one_out": "events of a user at the same time stay in file order",
    "leave_last": "events of a user at the same time stay in file order",
    "global_time": "an event at the cut-off time is after it; events of a user at the same time stay in file order",
    "given": "events of a user at the same time stay in file order",
}


@dataclass(frozen=True, kw_only=True)
class Histories:
    """All events, user after user, oldest first.

    User u is `user_ids[u]` and has the events `offsets[u]` to `offsets[u + 1]`; event e is item `item_ids[items[e]]` at
    `times[e]` seconds (None without times). Users and items are sorted by their ids. `splits[e]` is the number in
    `SPLITS` of the split that a column of the log gives event e, -1 where it gives none of them.
    """

    user_ids: pl.Series
    item_ids: pl.Series
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    splits: np.ndarray | None = None
    users_dropped: int = 0
    events_dropped: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def histories(interactions: pl.DataFrame, *, min_events: int = 1, may_be_empty: bool = False) -> Histories:
    """Group a log by user; users with fewer than `min_events` events are left out as if they were not in the log.

    Needs user_id, item_id, `order`, timestamp where there are times, and split where splits are given. Raises
    `DataError` when no user is left, unless the log `may_be_empty`, as a part of one may.
    """
    more = [c for c in ("timestamp", "split") if c in interactions.columns]
    log = interactions.select(["user_id", "item_id", "order", *more])
    if not _is_in_order(log):
        log = log.sort(["user_id", "order"], maintain_order=True)
    counts = run_lengths(log.get_column("user_id"))
    kept = counts >= min_events
    if not kept.all():
        log = log.filter(pl.Series(np.repeat(kept, counts)))
    if log.is_empty() and not may_be_empty:
        raise DataError(
            "no user has enough events",
            where="interactions",
            expected=f"users with at least {min_events} events (min_events)",
            mend="lower min_events, or bring more data",
        )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[kept], dtype=np.int64)])
    item_ids, items = coded(log.get_column("item_id"))
    return Histories(
        user_ids=log.get_column("user_id").gather(offsets[:-1]),
        item_ids=item_ids,
        offsets=offsets,
        items=items,
        times=log.get_column("timestamp").to_numpy() if "timestamp" in log.columns else None,
        splits=_numbered(log.get_column("split")) if "split" in log.columns else None,
        users_dropped=int(np.count_nonzero(~kept)),
        events_dropped=int(counts[~kept].sum()),
    )


def coded(ids: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The different ids in order, and int32 [n]: the number of each id among them."""
    if ids.dtype.is_integer() and len(ids):
        low, high = int(ids.min()), int(ids.max())  # type: ignore[arg-type]
        if high - low < 4 * len(ids):
            values, is_there = ids.to_numpy(), np.zeros(high - low + 1, bool)
            for at in blocks(len(values)):
                is_there[values[at] - low] = True
            numbers = np.cumsum(is_there, dtype=np.int32) - 1
            different = pl.Series(ids.name, np.flatnonzero(is_there) + low, dtype=ids.dtype)
            return different, look_up(numbers, values, low=low)
    different = ids.unique().sort()
    if ids.dtype.is_integer():
        return different, np.searchsorted(different.to_numpy(), ids.to_numpy()).astype(np.int32)
    return different, ids.cast(pl.Enum(different)).to_physical().cast(pl.Int32).to_numpy()


def run_lengths(values: pl.Series) -> np.ndarray:
    """int64: the length of each run of equal values."""
    return values.rle().struct.field("len").to_numpy().astype(np.int64)


def _is_in_order(log: pl.DataFrame) -> bool:
    (user, user_before), (order, order_before) = (
        (log[column].slice(1), log[column].head(max(log.height - 1, 0))) for column in ("user_id", "order")
    )
    return bool(((user > user_before) | ((user == user_before) & (order >= order_before))).all())


@dataclass(frozen=True)
class Cuts:
    """How each user's events are divided.

    The first `train_end` are for training. The event at `valid_at` (`test_at`) is the valid (test) target and all
    events before it are its history; -1 where the user has no such target. What is held out together with the target
    goes on up to, and without, the event `valid_end` (`test_end`).
    """

    train_end: np.ndarray
    valid_at: np.ndarray
    test_at: np.ndarray
    valid_end: np.ndarray
    test_end: np.ndarray


def leave_one_out(lengths: np.ndarray) -> Cuts:
    """The last event is for test, the one before for valid; users with fewer than three events only train."""
    return leave_last(lengths, 1)


def leave_last(lengths: np.ndarray, held_out: int) -> Cuts:
    """The last `held_out` events are for test, of which the first is the target; the event before them is for valid.

    Users with fewer than `held_out + 2` events only train.
    """
    enough = lengths >= held_out + 2
    test_at = np.where(enough, lengths - held_out, -1)
    valid_at = np.where(enough, test_at - 1, -1)
    return Cuts(np.where(enough, valid_at, lengths), valid_at, test_at, test_at, lengths)


def cutoff_times(times: np.ndarray, *, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    """The times that the last `valid_fraction + test_fraction` and the last `test_fraction` of the events begin with.

    They are times of events: with n events in order of time, the event number floor(n * (1 - fraction)).
    """
    numbers = [cutoff_number(len(times), f) for f in (valid_fraction + test_fraction, test_fraction)]
    found = np.partition(times, numbers)
    return int(found[numbers[0]]), int(found[numbers[1]])


def cutoff_number(events: int, fraction: float) -> int:
    """The number, in order of time, of the event that the last `fraction` of so many begin with."""
    return min(int(events * (1 - fraction) + 1e-6), events - 1)


def events_before(times: np.ndarray, offsets: np.ndarray, cutoff: int) -> np.ndarray:
    """int64 per user: how many of its events are before `cutoff`."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(times < cutoff)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def global_time(lengths: np.ndarray, before_valid: np.ndarray, before_test: np.ndarray) -> Cuts:
    """Train on what is before the valid cut-off; the first event from each cut-off on is the target.

    An event of the valid period is never a test target, nor the other way round.
    """
    return Cuts(
        before_valid,
        np.where(before_valid < before_test, before_valid, -1),
        np.where(before_test < lengths, before_test, -1),
        before_test,
        lengths,
    )


def given(splits: np.ndarray, offsets: np.ndarray) -> Cuts:
    """As the events say: a user's first event of a held-out split is the target, all events before it the history.

    Raises `DataError` when an event is in no split, or a user's events are not first train, then valid, then test.
    """
    mend = "write train, valid or test, in this order within each user"
    if (splits < 0).any():
        raise DataError("an event is in no split", where="interactions, column split", mend=mend)
    first = np.zeros(len(splits), bool)
    first[offsets[:-1]] = True
    back = np.flatnonzero((np.diff(splits, prepend=0) < 0) & ~first)
    if len(back):
        number = int(np.searchsorted(offsets, back[0], "right"))
        what = f"a {SPLITS[splits[back[0]]]} event comes after a {SPLITS[splits[back[0] - 1]]} event of the same user"
        raise DataError(what, where=f"interactions, column split, user number {number}", mend=mend)
    sums = [np.concatenate([np.zeros(1, np.int64), np.cumsum(splits < k)]) for k in (1, 2)]
    return global_time(np.diff(offsets), *(s[offsets[1:]] - s[offsets[:-1]] for s in sums))


def _numbered(splits: pl.Series) -> np.ndarray:
    """int8: the number of each split's name, -1 for other values."""
    names = splits.cast(pl.String)
    return names.replace_strict(list(SPLITS), range(len(SPLITS)), default=-1, return_dtype=pl.Int8).to_numpy()
