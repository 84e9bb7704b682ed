"""A log in words: every user's events with what is said of them, divided into periods, and the tokenizer of it all.

Nothing here depends on the kind of task, so that all tasks over one data directory have the same tokenizer, the same
periods and the same users. What is done with odd data: an event whose item is not in the items table is told by the
item's id; an event without a rating in a log of ratings is told as `Wording.did`, and never asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.tables import Tables
from recjax.data.text import Tokenizer
from recjax.prompts.chat import Chat, Memo, format_named
from recjax.prompts.template import Template
from recjax.prompts.writer import Event
from recjax.tasks.prompted import Periods, Wording

RATINGS = ("rating", "value")
TRAIN, VALID, TEST = range(3)
_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Log:
    """The events of all users, user after user, oldest first.

    User u has the events `offsets[u]` to `offsets[u + 1]`. Event e is of `item[e]`, told as `actions[action[e]]`, with
    `rating[e]` (NaN where there is none), in the period `period[e]`. `before[e]` is the first event of the user that is
    not older than e, where a prompt that asks about e must end. `texts[i]` is what is said of item i, `genres[i]` its
    genres; `profiles[u]` what is said of a user, field by field.
    """

    user_ids: pl.Series
    item_ids: pl.Series
    offsets: np.ndarray
    item: np.ndarray
    action: np.ndarray
    rating: np.ndarray
    period: np.ndarray
    before: np.ndarray
    texts: list[str]
    genres: list[list[str]]
    actions: list[str]
    profiles: list[list[str]]
    rule: str
    has_ratings: bool

    def told(self, start: int, stop: int) -> list[Event]:
        """The events from `start` up to `stop` in words."""
        pairs = zip(self.item[start:stop].tolist(), self.action[start:stop].tolist(), strict=True)
        return [Event(self.texts[item], self.actions[action]) for item, action in pairs]

    def of_period(self, user: int, period: int) -> np.ndarray:
        """int64: the events of a user in a period."""
        first, last = self.offsets[user], self.offsets[user + 1]
        return first + np.flatnonzero(self.period[first:last] == period)


def read_log(wording: Wording, periods: Periods, tables: Tables) -> Log:
    """The log of these tables in words. Raises `DataError` when it has no items table, or no times to divide it by."""
    if tables.items is None:
        raise DataError(
            "a task in words needs an items table",
            where="items",
            expected="items.parquet or items.csv with titles",
            mend="bring one",
        )
    events = tables.interactions
    known = tables.items.select("item_id")
    unknown = events.select("item_id").unique().join(known, on="item_id", how="anti").sort("item_id")
    items = pl.concat([tables.items, unknown], how="diagonal_relaxed")
    numbers = items.select("item_id", item=pl.int_range(pl.len(), dtype=pl.Int64))
    users = events["user_id"].rle_id().to_numpy().astype(np.int64)
    counts = np.bincount(users, minlength=0)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    times = events["timestamp"].to_numpy() if tables.has_times else None
    period, rule = _periods(periods, times, offsets)
    rating, has_ratings = _ratings(events)
    action, actions = _actions(wording, events, rating)
    user_ids = events["user_id"].unique(maintain_order=True)
    return Log(
        user_ids=user_ids,
        item_ids=items["item_id"],
        offsets=offsets,
        item=events.select("item_id").join(numbers, on="item_id", how="left", maintain_order="left")["item"].to_numpy(),
        action=action,
        rating=rating,
        period=period,
        before=_before(times, offsets),
        texts=wording.items.texts(items, "items", "item_id"),
        genres=wording.genres.lists(items, "items"),
        actions=actions,
        profiles=_profiles(wording, tables.users, user_ids),
        rule=rule,
        has_ratings=has_ratings,
    )


def tokenizer_of(wording: Wording, tables: Tables, templates: Sequence[Template]) -> Tokenizer:
    """The tokenizer of a data directory: given, or trained on its items, users, queries and the built-in phrases.

    It does not depend on the task, as long as the `templates` are those that come with recjax.
    """
    if wording.tokenizer.path:
        return wording.tokenizer.make(())
    assert tables.items is not None
    texts = wording.items.texts(tables.items, "items", "item_id")
    texts += wording.details.texts(tables.items, "items", "item_id") if wording.details else []
    if tables.users is not None:
        texts += ["; ".join(parts) for parts in wording.users.parts(tables.users, "users")]
    if tables.queries is not None:
        texts += tables.queries["text"].cast(pl.String).drop_nulls().to_list()
    # A phrase and an action stand beside each text, so that they count as often as they are met in prompts.
    phrases = [phrase for template in templates for phrase in template.words()]
    actions = _actions(wording, tables.interactions, _ratings(tables.interactions)[0])[1]
    every = max(len(texts), len(phrases), len(actions))
    around = ((texts[k % len(texts)], actions[k % len(actions)], phrases[k % len(phrases)]) for k in range(every))
    return wording.tokenizer.make(" ".join(line) for line in around)


def chat_of(wording: Wording, tokenizer: Tokenizer) -> Chat:
    """The format of turns in the tokens of the tokenizer."""
    return Chat(format_named(wording.chat), Memo(tokenizer))


def _periods(periods: Periods, times: np.ndarray | None, offsets: np.ndarray) -> tuple[np.ndarray, str]:
    """int8: the period of each event, and the rule in words."""
    if periods.by == "last":
        lengths = np.diff(offsets)
        left = np.repeat(offsets[1:], lengths) - 1 - np.arange(offsets[-1])
        n = periods.held_out
        rule = f"each user's last {n} events are for test, the {n} before them for validation"
        return np.where(left < n, TEST, np.where(left < 2 * n, VALID, TRAIN)).astype(np.int8), rule
    if times is None:
        raise DataError(
            'Periods.by = "time" needs times',
            where="interactions",
            expected="a column timestamp",
            mend='bring timestamps, or set Periods.by = "last"',
        )
    ordered = np.sort(times)
    test, valid = (
        int(ordered[min(int(len(ordered) * (1 - held)), len(ordered) - 1)])
        for held in (periods.test_fraction, periods.test_fraction + periods.valid_fraction)
    )
    train = min(valid, test - int(periods.gap_days * _DAY))
    rule = (
        f"trained on before {train}, tested from {test} on (seconds since 1970; {(test - train) / _DAY:.1f} days "
        "later), validated between"
    )
    if train <= ordered[0]:
        raise DataError(
            f"a gap of {periods.gap_days:g} days leaves nothing to train on",
            where="interactions",
            expected=f"a log longer than its {(ordered[-1] - ordered[0]) / _DAY:.1f} days",
            mend="lower Periods.gap_days or the fractions",
        )
    return np.where(times >= test, TEST, np.where(times >= train, VALID, TRAIN)).astype(np.int8), rule


def _before(times: np.ndarray | None, offsets: np.ndarray) -> np.ndarray:
    """int64: for each event the first one of its user that is not older."""
    every = np.arange(offsets[-1])
    if times is None:
        return every
    is_first = np.ones(len(every), bool)
    is_first[1:] = times[1:] != times[:-1]
    is_first[offsets[:-1][np.diff(offsets) > 0]] = True
    return np.maximum.accumulate(np.where(is_first, every, 0))


def _ratings(events: pl.DataFrame) -> tuple[np.ndarray, bool]:
    """float64: the rating of each event, NaN where there is none; whether the log has any."""
    column = next((name for name in RATINGS if name in events.columns and events[name].dtype.is_numeric()), None)
    if column is None:
        return np.full(events.height, np.nan), False
    return events[column].cast(pl.Float64).fill_null(np.nan).to_numpy(), True


def _actions(wording: Wording, events: pl.DataFrame, rating: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What was done in each event, as a number, and in words."""
    values, number = np.unique(rating, return_inverse=True)
    rated = pl.Series([wording.rated.format(rating=f"{value:g}") for value in values.tolist()]).gather(number)
    did = pl.lit(wording.did)
    if "event" in events.columns:
        did = events["event"].cast(pl.String).fill_null(wording.did)
    said = pl.select(pl.when(pl.Series(~np.isnan(rating))).then(rated).otherwise(did)).to_series()
    words = said.unique().sort()
    numbers = said.replace_strict(words, pl.int_range(len(words), eager=True), return_dtype=pl.Int32)
    return numbers.to_numpy(), words.to_list()


def _profiles(wording: Wording, users: pl.DataFrame | None, user_ids: pl.Series) -> list[list[str]]:
    """What is said of each user, in order of `user_ids`."""
    if users is None:
        return [[] for _ in range(len(user_ids))]
    parts = wording.users.parts(users, "users")
    known = dict(zip(users["user_id"].to_list(), parts, strict=True))
    return [known.get(user, []) for user in user_ids.to_list()]
