"""Rows with labels: impressions that were clicked or not, ratings, candidates of a request.

What a row is told of is declared as fields (`recjax.data.fields`), what is asked of it as labels, one for each head of
a ranker. Only the settings are here; `impressions_work.py` does the work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recjax.core.errors import ConfigError
from recjax.data.counters import Counter, History
from recjax.data.fields import Categorical, Declaration
from recjax.data.imputation import Impute
from recjax.data.ranker_features import Join
from recjax.data.sources import DataDir
from recjax.tasks.next_item import NAME
from recjax.tasks.work import Work

SPLITS = ("time", "random", "given")
EVENTS = ("train", "all")
_RULE = re.compile(r"\s*([^\s<>=!]+)\s*(?:(>=|<=|>|<|==|!=|=)\s*(.+?))?\s*")
_HEAD = re.compile(r"\w[\w-]*")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A label by a column: its value, or whether it compares to `than` as `sign` says; unknown where it is missing."""

    column: str
    sign: str = ""
    than: str = ""

    @classmethod
    def read(cls, head: str, text: str) -> Rule:
        """ "click", "rating >= 4" or "event = purchase". Raises `ConfigError` for anything else."""
        found = _RULE.fullmatch(text)
        if not _HEAD.fullmatch(head) or found is None:
            raise ConfigError(
                f"cannot read the label {head}: {text!r}",
                where="Impressions.labels",
                expected='such as {"click": "clicked", "like": "rating >= 4", "buy": "event = purchase"}',
            )
        column, sign, than = found.groups(default="")
        return cls(column=column, sign="==" if sign == "=" else sign, than=than)


@dataclass(frozen=True, kw_only=True)
class Impressions:
    """Rows of the interactions of a data directory (`data/impression_log.py`), told of as `fields` and labelled.

    `labels` is head -> rule: a column of numbers from 0 to 1, or a comparison such as "rating >= 4". Where the column
    of a rule is missing, the label of the row is unknown. The rule "1" makes every row a positive.

    `joins` give rows the columns of their items and users, `imputation` fills in what they lack, `counters` and
    `histories` tell of earlier events: strictly earlier ones, and only of the training split with `events` "train".

    `split` "time" holds out the last rows in time, a fraction each, and drops what lies in the `gap` seconds before a
    held-out period; "random" holds out a fraction of the rows of each domain and label, by a hash of `seed`; "given"
    is by the column split, or by the files train, valid and test.

    For every positive of the first head `negatives` rows with another item are added that the user has no row with,
    drawn in proportion to (training rows) ** `negative_power` of an item, in every split alike. Of the negatives of
    the training split a share `keep_negatives` is kept; evaluation corrects predictions for that.

    `domain` names the column of the domain of a row, its own or one that is joined, and `weight` that of its weight in
    the loss; drawn rows have those of the row they were drawn for. `user` is the column that tells whose rows stand
    together in grouped metrics and intervals, and `item` that of the item. `request` is the column that tells which
    rows were candidates for one place, among which positives are ranked; where negatives are drawn and none is named,
    a positive and those drawn for it are a request.
    """

    data: DataDir = field(default_factory=DataDir)
    fields: Sequence[Declaration] = (Categorical(columns=("user_id", "item_id")),)
    labels: Mapping[str, str] = field(default_factory=lambda: {"click": "label"})
    joins: Sequence[Join] = (Join(table="items", key="item_id"), Join(table="users", key="user_id"))
    imputation: Sequence[Impute] = ()
    counters: Sequence[Counter] = ()
    histories: Sequence[History] = ()
    events: str = "train"
    split: str = "time"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    gap: int = 0
    negatives: int = 0
    negative_power: float = 0.0
    keep_negatives: float = 1.0
    domain: str = ""
    weight: str = ""
    user: str = "user_id"
    item: str = "item_id"
    request: str = ""
    seed: int = 0
    name: str = "impressions"

    def __post_init__(self) -> None:
        for name in ("fields", "joins", "imputation", "counters", "histories"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"Impressions.name = {self.name!r}", expected="letters, digits, _ and . only")
        if not self.fields or not self.labels:
            raise ConfigError("impressions without fields or labels", where="Impressions.fields, Impressions.labels")
        for name, allowed in (("split", SPLITS), ("events", EVENTS)):
            if getattr(self, name) not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise ConfigError(f"Impressions.{name} = {getattr(self, name)!r}", expected=expected)
        fractions = (self.valid_fraction, self.test_fraction)
        if not all(math.isfinite(f) and f > 0 for f in fractions) or sum(fractions) >= 1:
            raise ConfigError(
                f"Impressions.valid_fraction, test_fraction = {fractions}", expected="above 0, together below 1"
            )
        if self.gap < 0 or self.negatives < 0 or not 0 < self.keep_negatives <= 1:
            raise ConfigError(
                f"Impressions.gap, negatives, keep_negatives = {self.gap}, {self.negatives}, {self.keep_negatives}",
                expected="at least 0, at least 0, above 0 and at most 1",
            )
        heads = {head for history in self.histories if (head := history.head)}
        if heads - set(self.rules):
            raise ConfigError(f"a history of {', '.join(heads - set(self.rules))}", expected=", ".join(self.rules))

    @property
    def rules(self) -> dict[str, Rule]:
        """head -> rule, in order."""
        return {head: Rule.read(head, text) for head, text in self.labels.items()}

    def work(self) -> Work:
        """Read the rows and encode them.

        Raises `DataError` when a column that is named is not there, or a split would be empty.
        """
        # Not imported above: a training process has this class in its recipe and may be without polars.
        from recjax.data.impression_log import read_log

        return self.work_on(read_log(self.data))

    def work_on(self, log: Any) -> Work:
        """The same for an `ImpressionLog` already read."""
        from recjax.tasks.impressions_work import make_work

        return make_work(self, log)
