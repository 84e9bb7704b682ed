"""Popularity of the last days: what everybody has had lately, at the moment the question is asked.

The score of an item is the number of events it had in the `days` before the time of the question. Which events are
known is told by their time alone: those of the training split and of all held-out histories that happened before.
The time of the question is that of the target where models are told it, else the user's last event, or, where a split
holds out a period of everybody's time, the end of what came before. Nothing is tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recjax.baselines.records import Records
from recjax.core.errors import ConfigError

DAY = 86_400


class RecentPopularity:
    """Counts over the events of `logs`, of which a user's longest record is taken."""

    def __init__(
        self, logs: Sequence[Records], num_rows: int, *, days: float = 7, target_time: bool, now: int | None = None
    ) -> None:
        """`now` is when all questions are asked, unless they are asked at `target_time`.

        Raises `ConfigError` for a log without times.
        """
        if any(log.times is None for log in logs):
            raise ConfigError(
                "recent_popularity needs times",
                where="Evaluation.baselines",
                expected="a log with timestamps",
                mend="leave recent_popularity out of Evaluation.baselines",
            )
        self._days, self._num_rows, self._target_time, self._now = days, num_rows, target_time, now
        times, items = _longest(logs)
        order = np.argsort(times, kind="stable")
        self._times, self._items = times[order], items[order]

    @property
    def settings(self) -> dict[str, float]:
        """The length of the window."""
        return {"days": self._days}

    def asked_at(self, records: Records) -> np.ndarray:
        """int64 [n]: the time of each question; events before it are known."""
        if self._target_time:
            assert records.label_time is not None
            return records.label_time
        if self._now is not None:
            return np.full(len(records), self._now)
        assert records.times is not None
        ends = records.offsets[1:]
        return np.where(records.lengths > 0, np.append(records.times, 0)[np.maximum(ends - 1, 0)] + 1, 0)

    def scores(self, records: Records) -> np.ndarray:
        """float32 [n, v]."""
        asked = self.asked_at(records)
        span = int(self._days * DAY)
        bounds = np.stack([np.searchsorted(self._times, asked - span), np.searchsorted(self._times, asked)], axis=1)
        windows, which = np.unique(bounds, axis=0, return_inverse=True)
        counts = np.empty((len(windows), self._num_rows), np.float32)
        for at, (start, stop) in enumerate(windows.tolist()):
            counts[at] = np.bincount(self._items[start:stop], minlength=self._num_rows)
        return counts[which.reshape(-1)]


def _longest(logs: Sequence[Records]) -> tuple[np.ndarray, np.ndarray]:
    """Times and rows of each user's longest record."""
    users = np.concatenate([log.user_index for log in logs])
    lengths = np.concatenate([log.lengths for log in logs])
    source = np.repeat(np.arange(len(logs)), [len(log) for log in logs])
    place = np.concatenate([np.arange(len(log)) for log in logs])
    order = np.lexsort((-lengths, users))
    first = order[np.concatenate([[True], users[order][1:] != users[order][:-1]])] if len(order) else order
    chosen = [log.take(place[first][source[first] == at]) for at, log in enumerate(logs)]
    times = [part.times for part in chosen if part.times is not None]
    return np.concatenate(times), np.concatenate([part.items for part in chosen])
