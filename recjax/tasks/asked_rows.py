"""The questions of a ranking task in words as rows with labels, for models of ids beside a language model.

A model that knows users and items by their ids learns from every rating of the training period, and is asked what the
language model is asked: the same users about the same items, told of the same events. Only the settings are here;
`asked_work.py` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recjax.core.errors import ConfigError
from recjax.tasks.impressions import Impressions
from recjax.tasks.prompted_ranking import Rated
from recjax.tasks.work import Work

ASKED = "asked"  # the column that tells which events are rows


@dataclass(frozen=True, kw_only=True)
class AskedRows(Impressions):
    """Rated events as rows: those of the training period, and those that a record of `asked` asks about.

    The rows of the validation and test splits have the time of the first event that their record asks about, so that
    histories end where the prompt does; they tell of all events before, those of held-out periods too. `labels` are
    by default that of `asked`. What the fields tell besides ids is up to `fields` and `histories`.
    """

    asked: Rated = field(default_factory=Rated)
    labels: Mapping[str, str] = field(default_factory=dict)
    events: str = "all"
    name: str = "asked"

    def __post_init__(self) -> None:
        least = f"{self.asked.least:g}"
        fixed = {"data": self.asked.data, "split": "given", "only": f"{ASKED} == 1"}
        fixed |= {} if self.labels else {"labels": {self.asked.name: f"rating >= {least}"}}
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        if self.negatives or self.keep_negatives != 1:
            raise ConfigError("AskedRows draws no rows", where="AskedRows.negatives, keep_negatives", expected="0, 1")
        super().__post_init__()

    def work(self) -> Work:
        """Read the log, find what is asked, and encode it; raises `DataError` as both tasks do."""
        return self.work_on(self.data.load())

    def work_on(self, log: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.asked_work import make_work

        return make_work(self, log)
