"""Documents for continued pre-training: a catalogue and a log, told as text.

One document per item (all that its fields say) and one per user (profile and events, in order of time), every token of
which is predicted. Only the settings are here; `documents_work.py` does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recjax.core.errors import ConfigError
from recjax.prompts.library import DOCUMENT
from recjax.prompts.template import Template
from recjax.tasks.prompted import Prompted
from recjax.tasks.work import Work

SOURCES = ("items", "log")


@dataclass(frozen=True, kw_only=True)
class Documents(Prompted):
    """The documents of the catalogue ("items") and of the users ("log"), as `sources` says.

    The log is told up to the end of the training period. `template` gives the phrases of a user's document, one style
    for each. A document opens with the special token `begin` and closes with `end`. A share `held_out` of the
    documents is kept for each of the validation and test splits, chosen by a hash of `seed`; a user's is so whatever
    the period. Documents may be longer than a window: feed them with `Feed.history = "chunk"` or "tile".
    """

    sources: tuple[str, ...] = SOURCES
    template: Template = DOCUMENT
    begin: str = "<s>"
    end: str = "</s>"
    held_out: float = 0.02
    seed: int = 0
    name: str = "documents"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources or not set(self.sources) <= set(SOURCES):
            raise ConfigError(f"Documents.sources = {self.sources}", expected=" or ".join(map(repr, SOURCES)))
        if not 0 < self.held_out < 0.5:
            raise ConfigError(f"Documents.held_out = {self.held_out}", expected="above 0, below .5")

    def work(self) -> Work:
        """Read the data and write the documents.

        Raises `DataError` when there is no items table, or no times to end the training period by.
        """
        return self.work_on(self.data.load())

    def work_on(self, tables: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.documents_work import make_work

        return make_work(self, tables)
