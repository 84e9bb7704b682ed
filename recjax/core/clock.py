"""Where the time of a run goes, and how much of it became steps that were kept.

Every moment of the loop is put down to one thing: `lap(kind)` gives it all that passed since the lap before. A step
consists of waiting for data, of the host's own work (putting the batch on the devices, dispatching, logging) and of
waiting for the device; the first step of a start, which compiles, counts as `start`. Goodput is the share of the time
since the first start of a run, breaks between starts included, that was spent on steps still there: what a start did
after its last checkpoint is repeated by the next one and counts once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

STEP = ("data", "host", "device")
OTHER = ("start", "evaluate", "save")


class Clock:
    """The time of one start of a run; `began` (seconds since 1970) and `kept` (seconds) are of the starts before it."""

    def __init__(
        self,
        *,
        began: float,
        kept: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
        date: Callable[[], float] = time.time,
    ) -> None:
        self._now, self._wall = now, date() - began  # of this start; measured by a clock that nobody sets
        self._first = self._mark = now()
        self._kept = kept
        self._spent: dict[str, float] = dict.fromkeys((*STEP, *OTHER), 0.0)
        self._steps, self._is_warm = 0, False

    def lap(self, kind: str) -> float:
        """Put down to `kind` what passed since the last lap; returns the seconds."""
        now = self._now()
        seconds, self._mark = now - self._mark, now
        if kind in STEP and not self._is_warm:
            kind = "start"
        self._spent[kind] += seconds
        self._kept += seconds if kind in STEP else 0.0
        return seconds

    def step(self) -> None:
        """A step is done."""
        self._steps += self._is_warm
        self._is_warm = True

    def take(self) -> dict[str, float]:
        """The records since it was last asked.

        `step`, `data`, `host` and `device` are seconds a step, where there was one; `start`, `evaluate` and `save`
        seconds; `kept` and `wall` seconds of the whole run, and `goodput` the one divided by the other.
        """
        spent, steps = self._spent, self._steps
        self._spent, self._steps = dict.fromkeys(spent, 0.0), 0
        each = {kind: spent[kind] / steps for kind in STEP} if steps else {}
        wall = self._wall + self._now() - self._first
        total = {"kept": self._kept, "wall": wall, "goodput": self._kept / wall if wall > 0 else 0.0}
        return {**({"step": sum(each.values())} if each else {}), **each, **{k: spent[k] for k in OTHER}, **total}


def kept_until(records: Sequence[Mapping[str, Any]], step: int) -> float:
    """The seconds of kept steps that a `metrics.jsonl` tells of, up to a step."""
    return max((r["time/kept"] for r in records if "time/kept" in r and r["step"] <= step), default=0.0)
