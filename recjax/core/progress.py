"""How far long work is: a bar on a terminal, a plain line now and then elsewhere, always on stderr."""

from __future__ import annotations

import collections
import math
import sys
import time
from typing import Any

_WINDOW = 30.0  # seconds over which the rate is taken, so that compiling at the start does not count for ever


class Progress:
    """Shows done of `total`, rate, time left and whatever fields come with an update.

    `start` is what an earlier run had done. Off a terminal a line is written at the first update, at the last, and
    at most every `seconds_between` in between.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        start: int = 0,
        unit: str = "steps",
        seconds_between: float = 10.0,
        stream: Any = None,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._stream = sys.stderr if stream is None else stream
        self._seconds_between, self._last_line, self._unshown = seconds_between, -math.inf, ""
        self._seen = collections.deque([(time.monotonic(), start)])
        self._bar = _Bar(name, total, start, self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def update(self, done: int, **fields: float | str) -> None:
        """`done` in all, and things to show beside it, such as loss=6.12."""
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        text = self._text(done, fields)
        if self._bar is not None:
            self._bar.update(done, text)
            return
        share = f" {done / self._total:.0%}" if self._total else ""
        self._unshown = f"{self._name} {done:,}/{self._total:,}{share}  {text}"
        if done >= self._total or now - self._last_line >= self._seconds_between:
            self._last_line = now
            self._show()

    def message(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.message(text)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Show where it ended, and give the terminal back."""
        if self._bar is not None:
            self._bar.close()
        self._show()

    def _show(self) -> None:
        if self._unshown:
            print(self._unshown, file=self._stream, flush=True)
        self._unshown = ""

    def _text(self, done: int, fields: dict[str, float | str]) -> str:
        shown = [
            f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in fields.items()
        ]
        (first_time, first), (last_time, last) = self._seen[0], self._seen[-1]
        if last > first and last_time > first_time:
            rate = (last - first) / (last_time - first_time)
            shown += [f"{rate:.3g} {self._unit}/s", f"{_clock((self._total - done) / rate)} left"]
        return "  ".join(shown)


class _Bar:
    """The same with rich, which is imported for a terminal only."""

    def __init__(self, name: str, total: int, start: int, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn(name), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self._rich = RichProgress(*columns, console=Console(file=stream, highlight=False))
        self._task = self._rich.add_task(name, total=total, completed=start, text="")
        self._rich.start()

    def update(self, done: int, text: str) -> None:
        self._rich.update(self._task, completed=done, text=text)

    def message(self, text: str) -> None:
        self._rich.console.print(text, markup=False)

    def close(self) -> None:
        self._rich.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
