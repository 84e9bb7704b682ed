"""What rows an impression task has before anything is encoded: labels, splits, drawn negatives.

Everything is a function of the log and the seed; rows keep the order of the log, and the drawn ones follow.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.hashing import hashes, uniform
from recjax.data.impression_log import SPLITS, raw_of
from recjax.tasks.impressions import Impressions, Rule

TRAIN, VALID, TEST = range(3)
DROPPED = -1
UNKNOWN = -1.0
_SPLIT, _NEGATIVES, _KEEP = 0x73706C74, 0x6E656761, 0x6B656570  # what a draw is for
_TRIES = 16
_SIGNS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Rows:
    """Number of the row in the log, part (`TRAIN`, ... or `DROPPED`), labels [n, heads], and for rows that are drawn
    the number of the item they have instead, -1 for logged ones."""

    log: np.ndarray
    part: np.ndarray
    labels: np.ndarray
    item: np.ndarray

    def take(self, rows: np.ndarray) -> Rows:
        """Some of them."""
        return Rows(self.log[rows], self.part[rows], self.labels[rows], self.item[rows])


def labels_of(rules: Mapping[str, Rule], frame: pl.DataFrame) -> np.ndarray:
    """float32 [n, heads]; `UNKNOWN` where the column of a rule is missing.

    Raises `DataError` for a column that is not there, or values outside of 0 to 1.
    """
    return np.stack([_label(head, rule, frame) for head, rule in rules.items()], axis=1).astype(np.float32)


def _label(head: str, rule: Rule, frame: pl.DataFrame) -> np.ndarray:
    if rule.column == "1" and not rule.sign:
        return np.ones(frame.height)
    where = f"the label {head}"
    if rule.column not in frame.columns:
        raise DataError(f"there is no column {rule.column}", where=where, expected=", ".join(frame.columns))
    column = raw_of(frame[rule.column])
    if column.offsets is not None:
        raise DataError(f"the column {rule.column} holds lists", where=where, expected="one value in each row")
    if not rule.sign:
        values = column.numbers(where)
        odd = ~column.missing & ((values < 0) | (values > 1))
        if odd.any():
            raise DataError(
                f"the label is {values[odd][0]:g}",
                where=f"{where}, row {int(np.flatnonzero(odd)[0]) + 1}",
                expected="a number from 0 to 1",
                mend=f'say from what on it is positive, such as {{"{head}": "{rule.column} >= 4"}}',
            )
        return np.where(column.missing, UNKNOWN, values)
    if column.values.dtype == object:
        if rule.sign not in ("==", "!="):
            raise DataError(f"the column {rule.column} is text", where=where, expected="= or != in its rule")
        codes, texts = column.keys
        holds = np.array([_SIGNS[rule.sign](text, rule.than) for text in texts], bool)[codes]
    else:
        try:
            holds = _SIGNS[rule.sign](column.numbers(where), float(rule.than))
        except ValueError:
            raise DataError(f"{rule.column} is a number, {rule.than!r} is not", where=where) from None
    return np.where(column.missing, UNKNOWN, holds.astype(np.float64))


def parts_of(
    task: Impressions, frame: pl.DataFrame, labels: np.ndarray, domain: np.ndarray, users: np.ndarray
) -> tuple[np.ndarray, str]:
    """int8 [n]: the part of each row of the log, and the rule in words. Raises `DataError` where it cannot be.

    `users` int64 [n] numbers the user of each row.
    """
    if task.split == "given":
        return _given(frame), "given by the column split, or the file a row is in"
    if task.split == "random":
        part = _stratified(task, labels[:, 0], domain)
        rule = f"random by seed {task.seed}: {task.valid_fraction:g} valid and {task.test_fraction:g} test of the rows"
        return part, rule + " of each domain and label"
    times = times_of(frame, f"Impressions.split = {task.split!r}")
    if task.split == "user_time":
        return _by_user(task, times, users), (
            f"by time within each user: the last {task.test_fraction:g} test, {task.valid_fraction:g} before them valid"
            + (f"; without the {task.gap} seconds before either" if task.gap else "")
        )
    cuts = np.sort(times)[[int(len(times) * share) for share in _starts(task)]]
    part = np.searchsorted(cuts, times, side="right").astype(np.int8)
    early = np.maximum.reduce([(times < cut) & (times >= cut - task.gap) for cut in cuts])
    part[early] = DROPPED
    rule = f"by time: train before {cuts[0]}, valid from then on, test from {cuts[1]} on (seconds since 1970)"
    return part, rule + (f"; without the {task.gap} seconds before either" if task.gap else "")


def times_of(frame: pl.DataFrame, needed_by: str) -> np.ndarray:
    """int64 [n]: seconds since 1970; raises `DataError` where rows have no time."""
    if "timestamp" not in frame.columns:
        raise DataError(
            f"{needed_by} needs times",
            where="interactions",
            expected="a column timestamp",
            mend='bring timestamps, or set Impressions.split = "random"',
        )
    return frame["timestamp"].to_numpy().astype(np.int64)


def with_negatives(
    task: Impressions, rows: Rows, users: np.ndarray, items: np.ndarray, num_items: int, domain: np.ndarray
) -> tuple[Rows, int]:
    """The rows and the negatives drawn for their positives, and how many found no item.

    `users`, `items` and `domain` number the user (or whatever is `apart`), the item and the domain of each row of the
    log; what is drawn for a row is an item that its domain has rows with.
    """
    if not task.negatives:
        return rows, 0
    positive = np.flatnonzero((rows.labels[:, 0] >= 0.5) & (rows.part != DROPPED))
    positive = np.repeat(positive, np.where(rows.part[positive] == TRAIN, task.negatives, task.later_negatives))
    weight = np.bincount(items[rows.log[rows.part == TRAIN]], minlength=num_items).astype(np.float64)
    weight = weight**task.negative_power if task.negative_power else np.ones(num_items)
    if task.negative_uniform:
        weight = (1 - task.negative_uniform) * weight / weight.sum() + task.negative_uniform / num_items
    where = domain[rows.log[positive]]
    known = np.zeros((int(domain.max(initial=0)) + 1, num_items), bool)
    known[domain, items] = True
    weights = [weight * (known[d] if task.domain else 1) for d in range(len(known))]
    reaches = [np.cumsum(w) for w in weights]
    had = np.unique(users * num_items + items)
    drawn, todo = np.full(len(positive), -1, np.int64), np.arange(len(positive))
    for attempt in range(_TRIES):
        if not len(todo):
            break
        u = uniform(hashes(len(positive), task.seed, _NEGATIVES, attempt)[todo])
        found = np.zeros(len(todo), np.int64)
        for d in np.unique(where[todo]):
            mine, reach = where[todo] == d, reaches[d]
            last = int(np.flatnonzero(weights[d])[-1]) if weights[d].any() else num_items - 1
            found[mine] = np.minimum(np.searchsorted(reach, u[mine] * reach[-1], side="right"), last)
        pair = users[rows.log[positive[todo]]] * num_items + found
        fresh = had[np.minimum(np.searchsorted(had, pair), len(had) - 1)] != pair
        drawn[todo[fresh]] = found[fresh]
        todo = todo[~fresh]
    for place in todo.tolist():  # of users who had most of what is drawn: out of what is left
        begin, end = np.searchsorted(had, users[rows.log[positive[place]]] * num_items + np.array([0, num_items]))
        left = weights[where[place]].copy()
        left[had[begin:end] % num_items] = 0
        if left.any():
            u = uniform(hashes(place + 1, task.seed, _NEGATIVES, _TRIES))[place]
            drawn[place] = np.searchsorted(np.cumsum(left), u * left.sum(), side="right")
    kept = drawn >= 0
    positive, drawn = positive[kept], drawn[kept]
    labels = np.where(rows.labels[positive] == UNKNOWN, UNKNOWN, 0).astype(np.float32)
    return Rows(
        np.concatenate([rows.log, rows.log[positive]]),
        np.concatenate([rows.part, rows.part[positive]]),
        np.concatenate([rows.labels, labels]),
        np.concatenate([rows.item, drawn]),
    ), int((~kept).sum())


def kept_rows(task: Impressions, rows: Rows) -> np.ndarray:
    """bool [n]: which rows are examples: all that are not dropped, but for the training negatives left out."""
    negative = (rows.part == TRAIN) & (rows.labels[:, 0] >= 0) & (rows.labels[:, 0] < 0.5)
    stays = uniform(hashes(len(negative), task.seed, _KEEP)) < task.keep_negatives
    return (rows.part != DROPPED) & (stays | ~negative)


def _starts(task: Impressions) -> tuple[float, float]:
    """Where the held-out parts begin, as shares of the rows."""
    return 1 - task.test_fraction - task.valid_fraction, 1 - task.test_fraction


def _by_user(task: Impressions, times: np.ndarray, users: np.ndarray) -> np.ndarray:
    """The rows of every user cut in time; rows of one second stay together, in the later part."""
    order = np.lexsort((times, users))
    who, when = users[order], times[order]
    first, size = np.searchsorted(who, who), np.bincount(who)[who]
    part = np.zeros(len(who), np.int8)
    places = [np.ceil(size * share - 1e-9).astype(np.int64) for share in _starts(task)]
    last = np.iinfo(np.int64).max  # a user with few rows may have none in a part
    cuts = [np.where(at < size, when[np.minimum(first + at, len(when) - 1)], last) for at in places]
    for cut in cuts:
        part += when >= cut
    for cut in cuts:
        part[(when < cut) & (when >= cut - task.gap)] = DROPPED
    found = np.empty_like(part)
    found[order] = part
    return found


def _given(frame: pl.DataFrame) -> np.ndarray:
    if "split" not in frame.columns:
        raise DataError(
            'Impressions.split = "given" needs a column split, or one file for each',
            where="interactions",
            expected="train, valid or test for every row",
            mend='bring it, or set Impressions.split = "time" or "random"',
        )
    names = frame["split"].cast(pl.String)
    known = names.is_in(SPLITS).fill_null(False)
    if not known.all():
        row = int((~known).arg_true()[0])
        raise DataError(
            f"{names[row]!r} is no split", where=f"interactions, row {row + 1}", expected=" or ".join(SPLITS)
        )
    return names.replace_strict(SPLITS, [TRAIN, VALID, TEST], return_dtype=pl.Int8).to_numpy()


def _stratified(task: Impressions, label: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The rows of each domain and label, in the order of a hash: test rows first, then valid ones."""
    kind = np.where(label < 0, 2, label >= 0.5)
    group = np.unique(domain.astype(np.int64) * 3 + kind, return_inverse=True)[1]
    order = np.lexsort((hashes(len(label), task.seed, _SPLIT), group))
    sizes = np.bincount(group)
    place = np.empty(len(label), np.int64)
    place[order] = np.arange(len(label)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    test = np.rint(sizes * task.test_fraction)[group]
    valid = test + np.rint(sizes * task.valid_fraction)[group]
    return np.where(place < test, TEST, np.where(place < valid, VALID, TRAIN)).astype(np.int8)
