"""Ranking tasks in words: what a prompt asks about each candidate, and which words are the answers.

Each kind is a frozen dataclass over the same data, wording and periods. A training example is a prompt about one
candidate with its answer; a record of the validation or test split is the part of a prompt that all its candidates
share, what is asked about each, and their right answers. A task that is not in the training mixture is one that the
model never saw. Only the settings are here; `ranked_work.py` does the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from recjax.core.errors import ConfigError
from recjax.prompts.library import GENRE, LIKE, NEXT, RELEVANCE, STARS
from recjax.prompts.template import Template
from recjax.prompts.writer import Budget
from recjax.tasks.prompted import Prompted
from recjax.tasks.work import Work

YES_NO = ("No", "Yes")  # the label 1 is the one that is ranked by
DRAWS = ("uniform", "popular")


@dataclass(frozen=True, kw_only=True)
class Ranked(Prompted):
    """What ranking tasks have in common.

    A prompt tells the newest `history` events of a user, fewer where the `budget` has no room for them. Users are asked
    about from `min_history` events on. Of a user's training events `per_user` are asked about, chosen by a hash of
    `seed`; those of a lower number are among those of a higher. A held-out record has up to `candidates` candidates.
    With `mask` the answers alone are predicted in training, without it every token is. `words` are the answers, the
    right one of a candidate being number `label`. `budget.length` is for a whole prompt with its answer.

    With `together` above 1 a training example asks up to so many questions that share their prompt. Each sees the
    prompt and none of the other questions, as in scoring, so that a prompt is read once for all of them; examples are
    longer than the budget by the other questions. A user's events are then asked about with those that follow them.
    """

    question: ClassVar[tuple[str, ...]] = ("item",)
    about: ClassVar[tuple[str, ...]] = ()  # the fields of the instruction

    template: Template
    words: tuple[str, ...] = YES_NO
    budget: Budget = field(default_factory=Budget)
    history: int = 32
    min_history: int = 1
    per_user: int = 4
    candidates: int = 20
    together: int = 1
    mask: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "words", tuple(self.words))
        self.at_least(history=0, min_history=0, per_user=1, candidates=1, together=1)
        self.template.check(self.name, instruction=self.about, question=self.question)

    def work(self) -> Work:
        """Read the data and write the prompts.

        Raises `DataError` when the data has not what the task asks about, `ConfigError` when the label words are not
        single tokens, or a prompt is over its budget.
        """
        return self.work_on(self.data.load())

    def work_on(self, tables: Any) -> Work:
        """The same for `Tables` already read."""
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.tasks.ranked_work import make_work

        return make_work(self, tables)


@dataclass(frozen=True, kw_only=True)
class Rated(Ranked):
    """Whether a user rates an item at `least` so high: "like" with 4, "love" with 5."""

    about = ("least",)

    template: Template = LIKE
    least: float = 4.0
    name: str = "like"


@dataclass(frozen=True, kw_only=True)
class Stars(Ranked):
    """How many stars a user gives: the answers are as many words as there are stars, the lowest first.

    A rating counts as the nearest whole number, between 1 and the number of words.
    """

    template: Template = STARS
    words: tuple[str, ...] = ("1", "2", "3", "4", "5")
    name: str = "stars"


@dataclass(frozen=True, kw_only=True)
class WatchNext(Ranked):
    """Whether an item is what a user picks next, among items drawn from the catalogue.

    In training each event comes with `negatives` drawn items, which the user has not picked in the training period; in
    a record the user's next item is among drawn ones that the user never picked. They are drawn "uniform" or "popular"
    (as often as they are picked in training).
    """

    template: Template = NEXT
    negatives: int = 1
    draw: str = "popular"
    name: str = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(negatives=1, candidates=2)
        if self.draw not in DRAWS:
            raise ConfigError(f"WatchNext.draw = {self.draw!r}", expected=" or ".join(map(repr, DRAWS)))


@dataclass(frozen=True, kw_only=True)
class GenreAffinity(Ranked):
    """Whether a genre is among those of a user's next `horizon` items.

    The candidates of a record are the `candidates` genres that are most frequent in training. In training each chosen
    event asks about one genre that comes and one that does not.
    """

    question = ("genre", "horizon")

    template: Template = GENRE
    horizon: int = 3
    name: str = "genre"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(horizon=1, candidates=2)


@dataclass(frozen=True, kw_only=True)
class Relevance(Ranked):
    """Whether an item answers a query, by the judgments of the data: a label of at least `min_label`.

    Here `per_user` counts the training judgments of a query. Queries are divided into splits by a hash of their text.
    With each judged item come `negatives` drawn ones that have no judgment for the query, and count as answers to
    something else: for data that only says what is relevant.
    """

    about = ("query",)

    template: Template = RELEVANCE
    min_label: float = 1.0
    negatives: int = 1
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    name: str = "relevance"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(negatives=0)
        fractions = (self.valid_fraction, self.test_fraction)
        if not all(math.isfinite(f) and f > 0 for f in fractions) or sum(fractions) >= 1:
            raise ConfigError(
                f"Relevance.valid_fraction, test_fraction = {fractions}", expected="above 0, together below 1"
            )
