"""How popular every item was at every time: the only thing that PrepRec knows about an item.

From the events of a log come two tables of percentiles, one column for each period since the first event: `coarse`
follows popularity over months, `fine` over days. Column j tells what was known when period j ended, so whoever asks in
period p may look at column p - 1 at the latest; this file makes the columns and never says which one to take
(`recjax.models.preprec` does, in one place). The tables belong to a log, not to a model: they are made anew for every
run and are in no checkpoint. What an encoding of a percentile looks like is the model's matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.data.examples import Examples
from recjax.data.record import spans
from recjax.data.vocab import FIRST_ITEM

DAY = 86_400
WHOLE = np.iinfo(np.uint16).max  # what stands for 100 percent
EVENTS = ("train", "all")
_MAX_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Popularity over time as facts for a recipe (Wang et al. 2024, arXiv 2401.01497, section 4.1).

    A coarse period has `coarse_days` and a fine one `fine_days`. The coarse popularity of an item is its events so
    far, those of each earlier period times `decay` once more; the fine one its events of the last `window` fine
    periods. Fine periods of one day with `window` 8 follow a log with daily times up to the day before the query.

    `events` says whose events count: "train" those of the training split alone; "all" also those that are held out for
    validation and test, where, as on a live system, everybody's events are known once their period is over. A user's
    own target is never known when it is asked for. The two are different protocols: do not put them in one table.
    """

    coarse_days: float = 10
    fine_days: float = 2
    window: int = 4
    decay: float = 0.5
    events: str = "train"

    def __post_init__(self) -> None:
        for name in ("coarse_days", "fine_days"):
            days = getattr(self, name)
            if not (math.isfinite(days) and 1 <= days * DAY < 2**31):
                raise ConfigError(
                    f"Dynamics.{name} = {days}", expected="a number of days, from a second to 24,855 days"
                )
        if self.window < 1:
            raise ConfigError(f"Dynamics.window = {self.window}", expected="at least 1")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"Dynamics.decay = {self.decay}", expected="above 0 and at most 1")
        if self.events not in EVENTS:
            raise ConfigError(f"Dynamics.events = {self.events!r}", expected=" or ".join(map(repr, EVENTS)))

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """The facts of these examples.

        `item/coarse` and `item/fine`, uint16 [v, periods]: percentiles, 65535 for 100 percent, 0 for items not seen
        by then. Their last column holds for all later times as well. `item/popularity_origin`, `item/coarse_seconds`,
        `item/fine_seconds`, int32 scalars: when the first periods begin, and how long a period is. Raises
        `ExamplesError` for examples without times and `ConfigError` for more periods than fit in memory.
        """
        logs = [log_of(one, self.events) for one in examples]
        rows, times = (np.concatenate([log[i] for log in logs]) for i in range(2))
        num_rows = examples[0].vocab.num_rows
        origin = int(times.min() // DAY * DAY) if len(times) else 0
        seconds = {"coarse": round(self.coarse_days * DAY), "fine": round(self.fine_days * DAY)}
        period = {name: (times - origin) // length for name, length in seconds.items()}
        for name, of_event in period.items():
            size = 2 * num_rows * (int(of_event.max(initial=0)) + 1)
            if size > _MAX_BYTES:
                raise ConfigError(
                    f"the {name} popularity of {num_rows:,} rows would take {size / 2**30:.0f} GiB",
                    where=f"Dynamics.{name}_days = {getattr(self, f'{name}_days')}",
                    expected=f"at most {_MAX_BYTES / 2**30:.0f} GiB",
                    mend="take longer periods, or see whether some timestamps are wrong",
                )
        return {
            "item/coarse": decayed(rows, period["coarse"], num_rows, decay=self.decay),
            "item/fine": windowed(rows, period["fine"], num_rows, window=self.window),
            "item/popularity_origin": np.asarray(origin).astype(np.int32),
            **{f"item/{name}_seconds": np.asarray(length, np.int32) for name, length in seconds.items()},
        }


def log_of(examples: Examples, events: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Rows int32 [n] and times int64 [n] of the events of known items, in no order.

    "train": of the training split. "all": every user's longest record, with its target. Raises `ExamplesError` where
    there are no times.
    """
    rows, times = [], []
    taken = np.zeros(0, np.int64)
    for split in ("test", "valid", "train") if events == "all" else ("train",):
        if split not in examples.splits:
            continue
        names = [field.name for field in examples.schema(split)]
        if "times" not in names:
            raise ExamplesError(
                "the examples have no times",
                where=str(examples.path),
                expected="a log with timestamps, to tell how popular an item was when",
            )
        source = examples.source(split)
        found = source.read(np.arange(len(source)), [n for n in names if n != "train_events"])
        users, at = found["user_index"]
        users = users[at]
        mine = ~np.isin(users, taken)
        lengths = source.lengths[mine].astype(np.int64)
        for kept, name in ((rows, "items"), (times, "times")):
            values, begins = found[name]
            kept.append(values[spans(begins[mine], lengths)])
        if split != "train":
            for kept, name in ((rows, "label"), (times, "label_time")):
                values, at = found[name]
                kept.append(values[at][mine])
        taken = np.concatenate([taken, users])
    all_rows, all_times = np.concatenate(rows).astype(np.int32), np.concatenate(times).astype(np.int64)
    known = all_rows >= FIRST_ITEM
    return all_rows[known], all_times[known]


def decayed(rows: np.ndarray, period: np.ndarray, num_rows: int, *, decay: float) -> np.ndarray:
    """uint16 [num_rows, periods]: percentiles of sum_s decay^(t - s) n_s, n_s the events of period s <= t.

    Event e is of item `rows[e]` and in period `period[e]`, counted from 0.
    """

    def score() -> Iterator[np.ndarray]:
        total = np.zeros(num_rows)
        for count in _counts(rows, period, num_rows):
            total = total * decay + count
            yield total

    return _percentiles(score(), int(period.max(initial=-1)) + 1, rows, period, num_rows)


def windowed(rows: np.ndarray, period: np.ndarray, num_rows: int, *, window: int) -> np.ndarray:
    """uint16 [num_rows, periods + window]: percentiles of the events of the last `window` periods.

    By the last column the window is empty again, and all items seen are equal.
    """

    def score() -> Iterator[np.ndarray]:
        recent = [np.zeros(num_rows, np.int64)] * window
        total = np.zeros(num_rows, np.int64)
        for count in _counts(rows, period, num_rows, more=window):
            total = total + count - recent.pop(0)
            recent.append(count)
            yield total

    return _percentiles(score(), int(period.max(initial=-1)) + 1 + window, rows, period, num_rows)


def percentile(score: np.ndarray) -> np.ndarray:
    """100 times the rank of each score over how many there are, float64; equal scores share the mean of their ranks."""
    _, at, count = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    return 100 * mean_rank[at] / len(score)


def _percentiles(
    scores: Iterator[np.ndarray], periods: int, rows: np.ndarray, period: np.ndarray, num_rows: int
) -> np.ndarray:
    """Percentiles of each period's scores among the items seen so far, as shares of `WHOLE`."""
    first = np.full(num_rows, np.iinfo(np.int64).max)
    np.minimum.at(first, rows, period)
    out = np.zeros((max(periods, 1), num_rows), np.uint16)
    previous, number = np.zeros(0), 0
    for t, score in enumerate(scores):
        seen = np.flatnonzero(first <= t)
        score = score[seen]
        if t and len(seen) == number and np.array_equal(score, previous):
            out[t] = out[t - 1]
        elif len(seen):
            # The least popular of very many items still is not an unseen one.
            out[t, seen] = np.maximum(np.rint(percentile(score) * (WHOLE / 100)), 1)
        previous, number = score, len(seen)
    return np.ascontiguousarray(out.T)


def _counts(rows: np.ndarray, period: np.ndarray, num_rows: int, *, more: int = 0) -> Iterator[np.ndarray]:
    """int64 [num_rows] for each period: how many events of each item; then `more` periods without any."""
    order = np.argsort(period, kind="stable")
    last = int(period.max(initial=-1))
    bounds = np.searchsorted(period[order], np.arange(last + 2))
    for t in range(last + 1):
        yield np.bincount(rows[order[bounds[t] : bounds[t + 1]]], minlength=num_rows)
    for _ in range(more):
        yield np.zeros(num_rows, np.int64)
