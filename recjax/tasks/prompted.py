"""What all tasks in words have in common: how a data directory is put in words, and which events are asked about when.

Tasks in words share one tokenizer and one division of time, so that they can be trained as one mixture, one stage after
the other, and none of them sees what another one is asked. Only settings are here; `prompted_log.py` reads the data,
`documents_work.py`, `conversations_work.py` and `ranked_work.py` write the examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from recjax.core.errors import ConfigError
from recjax.data.sources import DataDir
from recjax.prompts.chat import ChatFormat, format_named
from recjax.prompts.fields import GENRES, TITLE, Entity, Field
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.tasks.next_item import NAME

_BY = ("time", "last")
PERIODS = ("train", "valid", "test")
USERS = Entity(
    fields=(
        Field(name="age", kind="number", required=False),
        Field(name="gender", required=False),
        Field(name="country", required=False),
    )
)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How the tables of a data directory are put in words, and spelt.

    `items` and `users` say what is told of an item and of a user, `details` what a document of its own tells of an item
    (None: no more than `items`). The `title` alone is how an item is called, and `genres` is the field whose values a
    task can ask about. `chat` is the format of turns, a name of
    `prompts.chat.FORMATS` or a format. An event of a log with a column rating (or value) is told as `rated`, one of a
    log with a column event as what stands there, any other one as `did`.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    items: Entity = field(default_factory=Entity)
    users: Entity = USERS
    details: Entity | None = None
    title: Field = TITLE
    genres: Field = GENRES
    chat: str | ChatFormat = "turns"
    rated: str = "rated {rating}"
    did: str = "watched"

    def __post_init__(self) -> None:
        format_named(self.chat)
        if self.rated.count("{rating}") != 1:
            raise ConfigError(f"Wording.rated = {self.rated!r}", expected="a phrase with {rating}")


@dataclass(frozen=True, kw_only=True)
class Periods:
    """Which events are trained on, and which are asked about.

    By "time", events before a time t are for training and those from t + gap on for test. The test period begins
    where the newest `test_fraction` of all events begins; t is where the `valid_fraction` before them begins, but at
    least `gap_days` earlier. What lies between is the validation period. By "last", which needs no times, each user's
    last `held_out` events are for test and as many before them for validation.

    A prompt holds only events that are older than all that is asked about: not one at the same second, either.
    """

    by: str = "time"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    gap_days: float = 30.0
    held_out: int = 5

    def __post_init__(self) -> None:
        if self.by not in _BY:
            raise ConfigError(f"Periods.by = {self.by!r}", expected=" or ".join(map(repr, _BY)))
        fractions = (self.valid_fraction, self.test_fraction)
        if not all(math.isfinite(f) and f > 0 for f in fractions) or sum(fractions) >= 1:
            raise ConfigError(
                f"Periods.valid_fraction, test_fraction = {fractions}", expected="above 0, together below 1"
            )
        if not (math.isfinite(self.gap_days) and self.gap_days >= 0):
            raise ConfigError(f"Periods.gap_days = {self.gap_days}", expected="0 or more")
        if self.held_out < 1:
            raise ConfigError(f"Periods.held_out = {self.held_out}", expected="at least 1")


@dataclass(frozen=True, kw_only=True)
class Told:
    """A data directory in words: what all tasks and all stages of a system have in common."""

    data: DataDir = field(default_factory=DataDir)
    wording: Wording = field(default_factory=Wording)
    periods: Periods = field(default_factory=Periods)


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A task in words; the kinds derive from it."""

    told: Told = field(default_factory=Told)
    name: str

    @property
    def data(self) -> DataDir:
        """The data directory."""
        return self.told.data

    @property
    def wording(self) -> Wording:
        """How it is put in words."""
        return self.told.wording

    @property
    def periods(self) -> Periods:
        """Which events are for what."""
        return self.told.periods

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"{type(self).__name__}.name = {self.name!r}", expected="letters, digits, _ and . only")

    def at_least(self, **least: int) -> None:
        """Raise `ConfigError` for a number below what it must be."""
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{type(self).__name__}.{name} = {getattr(self, name)}", expected=f"at least {bound}")
