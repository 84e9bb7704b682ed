"""Conversations for fine-tuning: a member's history turn by turn, and records of instructions.

In the first, each past item is a user's turn and what was done with it the assistant's answer, so that one reading of a
conversation trains every event of it. The second are questions and answers of any kind, from a file or made out of the
catalogue. Only the settings are here; `conversations_work.py` and `instructions_work.py` do the work.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recjax.core.errors import ConfigError, DataError
from recjax.prompts.library import CATALOGUE, CONVERSATION
from recjax.prompts.template import Template
from recjax.prompts.writer import Budget
from recjax.tasks.prompted import Prompted
from recjax.tasks.work import Work


@dataclass(frozen=True, kw_only=True)
class Conversations(Prompted):
    """The events of the training period as conversations of at most `budget.length` tokens, each event in one of them.

    A conversation opens with the instruction and the profile. A history that is too long for one is cut between events
    from the newest backwards, and of several the newest `most` are kept (0: all). With `negatives` above 0 as many
    drawn items, which the user has not picked, come with each event; they are answered `not_picked`, which gives logs
    without ratings something to tell apart. With `mask` answers alone are predicted, without it every token is.

    A validation or test example is a conversation that ends with the first `asked` events of the period, of which the
    answers are predicted, after as much of the history as fits.
    """

    template: Template = CONVERSATION
    budget: Budget = field(default_factory=Budget)
    most: int = 0
    negatives: int = 0
    not_picked: str = "no"
    asked: int = 8
    mask: bool = True
    seed: int = 0
    name: str = "conversations"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(most=0, negatives=0, asked=1)
        self.template.check(self.name, instruction=(), question=("item",))

    def work(self) -> Work:
        """Read the data and write the conversations.

        Raises `DataError` when there is no items table, no times to divide it by, or an event does not fit the budget.
        """
        return self.work_on(self.data.load())

    def work_on(self, tables: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.conversations_work import make_work

        return make_work(self, tables)


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """A file with a conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}.

    Roles are system, user and assistant. {"conversations": [{"from": "human", "value": "..."}, ...]} is read as well.
    """

    path: str

    def told(self) -> dict[str, Any]:
        """What the file holds, wherever it lies."""
        return {"jsonl": hashlib.sha256(self.read()).hexdigest()}

    def read(self) -> bytes:
        """The bytes of the file; raises `DataError` when it cannot be read."""
        try:
            return Path(self.path).expanduser().read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the conversations: {error.strerror}",
                where=self.path,
                expected="a file with a JSON object a line",
                mend="correct Jsonl.path, or leave Instructions.source out to ask about the catalogue",
            ) from None


@dataclass(frozen=True, kw_only=True)
class Instructions(Prompted):
    """Questions and answers: the conversations of `source`, or one about each field of each item of the catalogue.

    What is over `budget.length` is left out by whole exchanges, the last first, and counted. A share `held_out` of the
    records is kept for each of the validation and test splits, chosen by a hash of `seed`.
    """

    source: Jsonl | None = None
    template: Template = CATALOGUE
    budget: Budget = field(default_factory=Budget)
    held_out: float = 0.02
    mask: bool = True
    seed: int = 0
    name: str = "instructions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 0.5:
            raise ConfigError(f"Instructions.held_out = {self.held_out}", expected="above 0, below .5")
        self.template.check(self.name, instruction=(), question=("field", "item"))

    def work(self) -> Work:
        """Read the data and write the records.

        Raises `DataError` when there is no items table, or a line of the file is no conversation.
        """
        return self.work_on(self.data.load())

    def work_on(self, tables: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.instructions_work import make_work

        return make_work(self, tables)
