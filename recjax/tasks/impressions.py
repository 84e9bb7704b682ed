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
from recjax.data.ahead import Ahead
from recjax.data.counters import Counter, History
from recjax.data.fields import Categorical, Declaration
from recjax.data.identity import LATER
from recjax.data.imputation import Impute
from recjax.data.ranker_features import Join
from recjax.data.sources import DataDir
from recjax.tasks.next_item import NAME
from recjax.tasks.work import Work

SPLITS = ("time", "user_time", "random", "given")
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
    of a rule is missing, the label of the row is unknown. The rule "1" makes every row a positive. `ahead` are heads
    whose labels are numbers, of what a user goes on to do.

    `joins` give rows the columns of their items and users, `imputation` fills in what they lack, `counters` and
    `histories` tell of earlier events: strictly earlier ones, and only of the training split with `events` "train".

    `split` "time" holds out the last rows in time, a fraction each, and drops what lies in the `gap` seconds before a
    held-out period; "user_time" does so for the rows of each user alone; "random" holds out a fraction of the rows of
    each domain and label, by a hash of `seed`; "given" is by the column split, or by the files train, valid and test.

    For every positive of the first head `negatives` rows with another item are added that the user has no row with,
    drawn in proportion to (training rows) ** `negative_power` of an item, in every split alike;
    a share `negative_uniform` of them whatever the item. Held-out splits have `held_negatives` where that is not None,
    and evaluation corrects predictions for it. `apart` names the column that stands for the user there: no item is
    drawn that has a row with the same value. Of the negatives of
    the training split a share `keep_negatives` is kept; evaluation corrects predictions for that.

    `only` is a rule, such as "surface == ads", for the rows of the task; `window` takes those of a part of the time,
    from and to as shares of all rows of the log, so that it means the same for every task on a log. Other rows are
    left out, but counters and histories with `events` "all" are told of them. `held_out` is a rule for the rows that
    may be held out, which say where the cuts are; others are trained on before the first cut and left out after it.
    With `cuts` the valid and the test rows of a split by time begin at these shares of all rows of the log instead.
    With `window_of` "user" both are shares of the rows of each user, in order of time.

    `domain` names the column of the domain of a row, its own or one that is joined. Domains are numbered by their
    training rows, those in `domains` before all others and in this order. `weight` is the column of its weight in
    the loss; drawn rows have those of the row they were drawn for, and are items that the domain has rows with. `user`
    is the column that tells whose rows stand together in grouped metrics and intervals, and `item` that of the item.
    `request` is the column that tells which rows were candidates for one place, among which positives are ranked; where
    negatives are drawn and none is named, a positive and those drawn for it are a request. `lengths` names a column of
    text by whose number of characters evaluation tells rows apart, such as what has been typed of a query. `titles`
    are the columns of the items table whose texts together stand for the title of an item (none: its title).
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
    ahead: Sequence[Ahead] = field(default=(), metadata={LATER: True})
    held_negatives: int | None = field(default=None, metadata={LATER: True})
    negative_uniform: float = field(default=0.0, metadata={LATER: True})
    apart: str = field(default="", metadata={LATER: True})
    domain: str = ""
    weight: str = ""
    user: str = "user_id"
    item: str = "item_id"
    request: str = ""
    only: str = field(default="", metadata={LATER: True})
    held_out: str = field(default="", metadata={LATER: True})
    window: tuple[float, float] = field(default=(0.0, 1.0), metadata={LATER: True})
    cuts: tuple[float, ...] = field(default=(), metadata={LATER: True})
    window_of: str = field(default="log", metadata={LATER: True})
    domains: tuple[str, ...] = field(default=(), metadata={LATER: True})
    lengths: str = field(default="", metadata={LATER: True})
    titles: tuple[str, ...] = field(default=(), metadata={LATER: True})
    seed: int = 0
    name: str = "impressions"

    def __post_init__(self) -> None:
        lists = ("fields", "joins", "imputation", "counters", "histories", "ahead", "window", "cuts", "domains")
        for name in (*lists, "titles"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"Impressions.name = {self.name!r}", expected="letters, digits, _ and . only")
        if not self.fields or not self.labels:
            raise ConfigError("impressions without fields or labels", where="Impressions.fields, Impressions.labels")
        for name, allowed in (("split", SPLITS), ("events", EVENTS), ("window_of", ("log", "user"))):
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
        if not 0 <= self.negative_uniform <= 1 or self.later_negatives < min(self.negatives, 1):
            raise ConfigError(
                f"Impressions.negative_uniform, held_negatives = {self.negative_uniform}, {self.held_negatives}",
                expected="0 to 1, and at least 1 where there are negatives",
            )
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1:
            raise ConfigError(f"Impressions.window = {self.window}", expected="from and to, 0 <= from < to <= 1")
        if self.cuts and not (len(self.cuts) == 2 and self.window[0] < self.cuts[0] < self.cuts[1] < self.window[1]):
            expected = "where valid and test begin, in this order and within the window"
            raise ConfigError(f"Impressions.cuts = {self.cuts}", expected=expected)
        if self.window_of == "user" and (self.held_out or (self.cuts and self.gap)):
            raise ConfigError('Impressions.held_out, or a gap, with window_of = "user"', expected='window_of = "log"')
        if (self.cuts or self.held_out) and self.split != "time":
            raise ConfigError(f'Impressions.cuts, held_out with the split "{self.split}"', expected='split = "time"')
        named = [*self.labels, *(one.name for one in self.ahead)]
        if len(set(named)) != len(named):
            raise ConfigError(
                f"heads {', '.join(named)}", where="Impressions.labels, ahead", expected="different names"
            )
        heads = {head for history in self.histories if (head := history.head)}
        if heads - set(self.rules):
            raise ConfigError(f"a history of {', '.join(heads - set(self.rules))}", expected=", ".join(self.rules))

    @property
    def later_negatives(self) -> int:
        """Negatives of a positive in held-out splits."""
        return self.negatives if self.held_negatives is None else self.held_negatives

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
