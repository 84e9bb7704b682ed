"""The questions of "which item is next" for a model of sequences of ids, beside a language model.

It learns to predict the next item from the events of the training period, and is asked about the candidates of the
same users after the same events. Only the settings are here; `asked_next_work.py` does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recjax.core.errors import ConfigError
from recjax.tasks.next_item import NextItem
from recjax.tasks.prompted_ranking import WatchNext
from recjax.tasks.work import Work


@dataclass(frozen=True, kw_only=True)
class AskedNext(NextItem):
    """Next-item prediction over the data and periods of `asked`.

    A held-out record is of a user whom `asked` asks: the events that its prompt may tell, the target, and as `asked`
    the rows of all its candidates, the target first.
    """

    asked: WatchNext = field(default_factory=WatchNext)
    name: str = "asked_next"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.asked.data)
        object.__setattr__(self, "split", "given")
        super().__post_init__()
        if self.asked.min_history < 1:
            raise ConfigError(
                f"WatchNext.min_history = {self.asked.min_history}",
                where="AskedNext.asked",
                expected="at least 1: a model of sequences says nothing after no event",
            )
        kept = {"min_events": 1, "k_core": 1, "repeats": True, "catalogue": "interactions"}
        if bad := [name for name, value in kept.items() if getattr(self, name) != value]:
            raise ConfigError(f"AskedNext.{bad[0]} = {getattr(self, bad[0])!r}", expected=f"{kept[bad[0]]!r}, as asked")

    def work_on(self, tables: Any) -> Work:
        """Divide `Tables` and find what is asked; raises `DataError` as both tasks do."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.asked_next_work import make_work

        return make_work(self, tables)
