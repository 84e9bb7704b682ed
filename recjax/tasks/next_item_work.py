"""What next-item prediction does with data: the splits, the catalogue, the examples, and the counts.

The log is divided first, then the catalogue is made of what is trained on, then the examples. The first and the last
can be done with some of the users at a time (`next_item_beam.py`), which is why they are functions of their own.

What is done with odd data: an event whose item is outside the catalogue stays in the history as unknown; a held-out
target outside the catalogue, or without any event before it, cannot be ranked and is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.blocks import look_up, tally
from recjax.data.history import (
    TIE_RULES,
    Cuts,
    Histories,
    cutoff_times,
    events_before,
    given,
    global_time,
    histories,
    leave_last,
    leave_one_out,
)
from recjax.data.k_core import first_of_pairs, k_core
from recjax.data.record import Column, Field, RawColumns, Runs, Schema, spans
from recjax.data.tables import Tables
from recjax.data.titles import title_column
from recjax.data.vocab import FIRST_ITEM, OOV, ItemVocab
from recjax.tasks.next_item import NextItem
from recjax.tasks.work import AT_ONCE, Work, in_parts

_CATALOGUES = {
    "interactions": "items that occur in the interactions",
    "items": "items of the items table; interactions with others count as unknown",
}


@dataclass(frozen=True, kw_only=True)
class Divided:
    """Histories and where they are cut, by which rule, and what was left out of the log before."""

    log: Histories
    cuts: Cuts
    rule: str
    notes: Sequence[str] = ()

    @property
    def train_counts(self) -> pl.DataFrame:
        """item_id, and `train_count`: how many training events it has."""
        size = len(self.log.item_ids)
        counts = tally(self.log.items, size) - tally(self.log.items[self.later], size)  # the later ones are few
        return pl.DataFrame({"item_id": self.log.item_ids, "train_count": counts})

    @property
    def later(self) -> np.ndarray:
        """The numbers of the events that are not for training."""
        return spans(self.log.offsets[:-1] + self.cuts.train_end, self.log.lengths - self.cuts.train_end)


def make_work(task: NextItem, tables: Tables) -> Work:
    """The work of `task` on these tables; raises `DataError` as `NextItem.work` says."""
    return work_of(task, tables, divide(task, tables.interactions))


def divide(
    task: NextItem,
    interactions: pl.DataFrame,
    *,
    cutoffs: tuple[int, int] | None = None,
    may_be_empty: bool = False,
) -> Divided:
    """The histories of a log, or of a part of one, which `may_be_empty`, and their cuts.

    Those of "global_time" are at the times `cutoffs`, or where a share of the events of this log lies before.
    """
    interactions, notes = _dense(task, interactions)
    log = histories(interactions, min_events=task.min_events, may_be_empty=may_be_empty)
    cuts, rule = _cuts(task, log, cutoffs)
    return Divided(log=log, cuts=cuts, rule=rule, notes=notes)


def work_of(task: NextItem, tables: Tables, divided: Divided) -> Work:
    """The work of `task` once the log is divided."""
    log, times = divided.log, divided.log.times is not None
    vocab, items = catalogue(task, tables.items, divided.train_counts)
    rows = vocab.encode(log.item_ids)
    counts = counts_of(divided, rows)
    check_counts(task, counts)
    return Work(
        name=task.name,
        raw=examples_by_split(divided, rows),
        steps=(),
        schemas=schemas(times),
        vocab=vocab,
        items=items,
        users=pl.DataFrame({"user_index": np.arange(len(log.user_ids)), "user_id": log.user_ids}),
        facts={
            **stated(task, divided.rule, times),
            "simulated": tables.simulated,
            "counts": counts,
            "notes": [*tables.notes, *divided.notes],
            "warnings": [*tables.warnings],
        },
    )


def stated(task: NextItem, rule: str, times: bool) -> dict[str, Any]:
    """What a manifest says of the rules by which examples were made."""
    return {
        "kind": "next_item",
        "split_rule": rule,
        "tie_rule": TIE_RULES[task.split],
        "catalogue_rule": _CATALOGUES[task.catalogue],
        "times": times,
    }


def check_counts(task: NextItem, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Raise `DataError` when there is nothing to learn from."""
    if not counts["train"]["examples"]:
        raise DataError(
            "no user has two events to train on",
            where="interactions",
            expected=f"longer histories for the split {task.split}",
            mend="take a smaller held-out fraction, or bring more data",
        )


def _dense(task: NextItem, interactions: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The events that `repeats` and `k_core` leave, and what that did."""
    before, notes = interactions.height, []
    if not task.repeats:
        interactions = interactions.sort(["user_id", "order"], maintain_order=True)
        interactions = interactions.filter(pl.Series(first_of_pairs(*_codes(interactions))))
        notes.append(f"without repeats of a user's items: {interactions.height:,} of {before:,} events")
    if task.k_core > 1 and interactions.height:
        interactions = interactions.filter(pl.Series(k_core(*_codes(interactions), task.k_core)))
        notes.append(f"{task.k_core}-core of users and items: {interactions.height:,} of {before:,} events")
    return interactions, notes


def _codes(interactions: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Users and items as numbers from 0."""
    users, items = (
        (interactions.get_column(c).rank("dense") - 1).cast(pl.Int64).to_numpy() for c in ("user_id", "item_id")
    )
    return users, items


def _cuts(task: NextItem, log: Histories, cutoffs: tuple[int, int] | None) -> tuple[Cuts, str]:
    if task.split == "leave_one_out":
        rule = "leave one out: the last event is the test target, the one before it the valid target"
        return leave_one_out(log.lengths), rule
    if task.split == "leave_last":
        rule = f"leave last: the first of the last {task.held_out} events is the test target, the one before it "
        return leave_last(log.lengths, task.held_out), rule + "the valid target"
    if task.split == "given":
        if log.splits is None:
            raise DataError(
                'NextItem.split = "given" needs a column split',
                where="interactions",
                expected="train, valid or test for every event",
                mend='bring it, or set NextItem.split = "leave_one_out"',
            )
        rule = "given by the column split: the first event of a user in a split is the target"
        return given(log.splits, log.offsets), rule
    if log.times is None:
        raise DataError(
            "the split global_time needs times",
            where="interactions",
            expected="a column timestamp",
            mend='bring timestamps, or set NextItem.split = "leave_one_out"',
        )
    fractions = {"valid_fraction": task.valid_fraction, "test_fraction": task.test_fraction}
    valid, test = cutoffs or cutoff_times(log.times, **fractions)
    before = (events_before(log.times, log.offsets, t) for t in (valid, test))
    rule = f"global time: train before {valid}, valid from then on, test from {test} on (seconds since 1970); "
    return global_time(log.lengths, *before), rule + "the first event of a user in a period is the target"


def catalogue(task: NextItem, items: pl.DataFrame | None, known: pl.DataFrame) -> tuple[ItemVocab, pl.DataFrame]:
    """The vocabulary and the table of its rows, from the items table and the `train_counts` of the log."""
    if task.catalogue == "items":
        if items is None:
            raise DataError(
                'NextItem.catalogue = "items" needs an items table',
                where="items",
                expected="items.parquet or items.csv",
                mend='bring one, or set NextItem.catalogue = "interactions"',
            )
        known = (
            items.select("item_id")
            .join(known, on="item_id", how="left")
            .with_columns(pl.col("train_count").fill_null(0))
        )
    vocab = ItemVocab.from_counts(known.get_column("item_id"), known.get_column("train_count").to_numpy())
    row = vocab.encode(known.get_column("item_id"))
    found = known.select(pl.Series("row", row), "item_id", "train_count").sort("row")
    title = title_column(items)
    if title is not None and items is not None:
        titles = items.select("item_id", pl.col(title).cast(pl.String).alias("title"))
        found = found.join(titles, on="item_id", how="left", maintain_order="left")
    facets = _facets(task, items)
    if facets is not None:
        found = found.join(facets, on="item_id", how="left", maintain_order="left")
    return vocab, found


def _facets(task: NextItem, items: pl.DataFrame | None) -> pl.DataFrame | None:
    """item_id and what items can be filtered by, as words or lists of words; None where there is nothing."""
    known = [] if items is None else items.columns
    if missing := [name for name in task.facets if name not in known]:
        raise DataError(
            f"the items have no column {', '.join(missing)}",
            where="items",
            expected="; ".join(known) if known else "a table of items",
            mend="correct NextItem.facets, or name the column in DataDir.columns",
        )
    names = [name for name in ("domain", *task.facets) if name in known]
    if items is None or not names:
        return None
    schema = items.schema
    return items.select(
        "item_id", *(pl.col(n).cast(pl.List(pl.String) if isinstance(schema[n], pl.List) else pl.String) for n in names)
    )


def examples_by_split(divided: Divided, rows: np.ndarray, *, first_user: int = 0) -> dict[str, RawColumns]:
    """The examples of each split; item code c of the log is row `rows[c]`, its users are numbered from `first_user`.

    A user with two training events or more has a training example of them. A held-out example has as label the target,
    as `items` all events before it, and as `future` (`future_events` many) the events from it on that are held out with
    it; there is none without an event before the target, or where it is outside the catalogue.
    """
    log, cuts, items = divided.log, divided.cuts, look_up(rows, divided.log.items)
    begin = log.offsets[:-1]

    def lists(starts: np.ndarray, lengths: np.ndarray, names: tuple[str, str]) -> RawColumns:
        """Items and times of the events from `starts` on, so many for each user."""
        found = {names[0]: Runs(items, starts, lengths)}
        return found if log.times is None else {**found, names[1]: Runs(log.times, starts, lengths)}

    def held_out(target: np.ndarray, end: np.ndarray) -> RawColumns:
        users = np.flatnonzero(target >= 1)
        users = users[items[begin[users] + target[users]] != OOV]
        at, end = target[users], end[users]
        found = {
            "user_index": Column(first_user + users),
            **lists(begin[users], at, ("items", "times")),
            "label": Column(items[begin[users] + at]),
            "train_events": Column(cuts.train_end[users].astype(np.int32)),
            **lists(begin[users] + at, end - at, ("future", "future_times")),
            "future_events": Column((end - at).astype(np.int32)),
        }
        return found if log.times is None else {**found, "label_time": Column(log.times[begin[users] + at])}

    users = np.flatnonzero(cuts.train_end >= 2)
    return {
        "train": {
            "user_index": Column(first_user + users),
            **lists(begin[users], cuts.train_end[users], ("items", "times")),
        },
        "valid": held_out(cuts.valid_at, cuts.valid_end),
        "test": held_out(cuts.test_at, cuts.test_end),
    }


def later_rows(divided: Divided, vocab: ItemVocab) -> tuple[np.ndarray, np.ndarray]:
    """The user number and the row of every event that is not for training."""
    log = divided.log
    users = np.repeat(np.arange(len(log.lengths)), log.lengths - divided.cuts.train_end)
    return users, vocab.encode(log.item_ids)[log.items[divided.later]]


def schemas(times: bool) -> dict[str, Schema]:
    """The fields of the examples of each split."""
    return {"train": _schema(times), "valid": _schema(times, True), "test": _schema(times, True)}


def _schema(times: bool, held_out: bool = False) -> tuple[Field, ...]:
    fields = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
    fields += [Field(name="times", dtype="int64", rank=1)] if times else []
    if held_out:
        fields += [Field(name="label", dtype="int32", rank=0), Field(name="train_events", dtype="int32", rank=0)]
        fields += [Field(name="future", dtype="int32", rank=1), Field(name="future_events", dtype="int32", rank=0)]
        timed = [Field(name="label_time", dtype="int64", rank=0), Field(name="future_times", dtype="int64", rank=1)]
        fields += timed if times else []
    return tuple(fields)


def counts_of(divided: Divided, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """How many examples each split has, what was left out and why, and what else is odd."""
    log, cuts = divided.log, divided.cuts
    users = len(log.lengths)
    enough = int((cuts.train_end >= 2).sum())
    counts = {"train": {"examples": enough, "events": int(cuts.train_end.sum()), "too_short": users - enough}}
    for split, at in (("valid", cuts.valid_at), ("test", cuts.test_at)):
        usable = np.flatnonzero(at >= 1)
        labels = rows[log.items[log.offsets[usable] + at[usable]]]
        unknown = int((labels == OOV).sum())
        counts[split] = {
            "examples": len(usable) - unknown,
            "without_target": int((at < 0).sum()),
            "without_history": int((at == 0).sum()),
            "target_unknown": unknown,
            "target_seen_before": _seen_before(log, usable, at[usable]),
        }
    counts["log"] = {
        "users": users,
        "events": len(log.items),
        "items": len(log.item_ids),
        "users_below_min_events": log.users_dropped,
        "events_of_those_users": log.events_dropped,
        "events_outside_catalogue": int(tally(log.items, len(rows))[rows < FIRST_ITEM].sum()),
    }
    return counts


def _seen_before(log: Histories, users: np.ndarray, at: np.ndarray) -> int:
    """How many of these users have their target among the events before it."""
    starts, found = log.offsets[users], 0
    pairs = {"history": Runs(log.items, starts, at), "target": Column(log.items[starts + at])}
    for part in in_parts(pairs, AT_ONCE):
        history, target = part["history"].joined(), part["target"]
        repeated = np.flatnonzero(history.values == np.repeat(target.values, history.lengths))
        found += len(np.unique(np.searchsorted(np.cumsum(history.lengths), repeated, side="right")))
    return found
