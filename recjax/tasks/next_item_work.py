"""What next-item prediction does with data: the splits, the catalogue, the steps to examples, and the counts.

What is done with odd data: an event whose item is outside the catalogue stays in the history as unknown; a held-out
target outside the catalogue, or without any event before it, cannot be ranked and is left out and counted.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from recjax.core.errors import DataError
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
from recjax.data.record import Column, Field
from recjax.data.tables import Tables
from recjax.data.titles import title_column
from recjax.data.vocab import FIRST_ITEM, OOV, ItemVocab
from recjax.tasks.next_item import NextItem
from recjax.tasks.work import Change, Example, Keep, Lookup, Step, Work

_CATALOGUES = {
    "interactions": "items that occur in the interactions",
    "items": "items of the items table; interactions with others count as unknown",
}


def make_work(task: NextItem, tables: Tables) -> Work:
    """The work of `task` on these tables; raises `DataError` as `NextItem.work` says."""
    interactions, kept = _dense(task, tables.interactions)
    log = histories(interactions, min_events=task.min_events)
    cuts, rule = _cuts(task, log)
    train_codes = log.items[_is_before(log.offsets, cuts.train_end)]
    vocab, items = _catalogue(task, tables, log, np.bincount(train_codes, minlength=len(log.item_ids)))
    rows = vocab.encode(log.item_ids)
    user = {
        "user_index": Column(np.arange(len(log.user_ids))),
        "items": Column(log.items, log.offsets),
        "train_end": Column(cuts.train_end.astype(np.int32)),
    }
    if log.times is not None:
        user["times"] = Column(log.times, log.offsets)
    times = "times" in user
    held_out = {
        "valid": _held_out(cuts.valid_at, cuts.valid_end),
        "test": _held_out(cuts.test_at, cuts.test_end),
    }
    facts = {
        "kind": "next_item",
        "split_rule": rule,
        "tie_rule": TIE_RULES[task.split],
        "catalogue_rule": _CATALOGUES[task.catalogue],
        "simulated": tables.simulated,
        "times": times,
        "counts": _counts(log, cuts, rows),
        "notes": [*tables.notes, *kept],
        "warnings": [*tables.warnings],
    }
    users = pl.DataFrame({"user_index": np.arange(len(log.user_ids)), "user_id": log.user_ids})
    if not facts["counts"]["train"]["examples"]:
        raise DataError(
            "no user has two events to train on",
            where="interactions",
            expected=f"longer histories for the split {task.split}",
            mend="take a smaller held-out fraction, or bring more data",
        )
    return Work(
        name=task.name,
        raw={"train": user, **{split: {**user, **columns} for split, columns in held_out.items()}},
        steps=steps(rows),
        schemas={"train": _schema(times), "valid": _schema(times, True), "test": _schema(times, True)},
        vocab=vocab,
        items=items,
        users=users,
        facts=facts,
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


def _cuts(task: NextItem, log: Histories) -> tuple[Cuts, str]:
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
    valid, test = cutoff_times(log.times, valid_fraction=task.valid_fraction, test_fraction=task.test_fraction)
    before = (events_before(log.times, log.offsets, t) for t in (valid, test))
    rule = f"global time: train before {valid}, valid from then on, test from {test} on (seconds since 1970); "
    return global_time(log.lengths, *before), rule + "the first event of a user in a period is the target"


def _held_out(at: np.ndarray, end: np.ndarray) -> dict[str, Column]:
    return {"target_at": Column(at.astype(np.int32)), "target_end": Column(end.astype(np.int32))}


def _catalogue(task: NextItem, tables: Tables, log: Histories, counts: np.ndarray) -> tuple[ItemVocab, pl.DataFrame]:
    """The vocabulary, and the table of its rows."""
    known = pl.DataFrame({"item_id": log.item_ids, "train_count": counts.astype(np.int64)})
    if task.catalogue == "items":
        if tables.items is None:
            raise DataError(
                'NextItem.catalogue = "items" needs an items table',
                where="items",
                expected="items.parquet or items.csv",
                mend='bring one, or set NextItem.catalogue = "interactions"',
            )
        known = (
            tables.items.select("item_id")
            .join(known, on="item_id", how="left")
            .with_columns(pl.col("train_count").fill_null(0))
        )
    vocab = ItemVocab.from_counts(known.get_column("item_id"), known.get_column("train_count").to_numpy())
    row = vocab.encode(known.get_column("item_id"))
    items = known.select(pl.Series("row", row), "item_id", "train_count").sort("row")
    title = title_column(tables.items)
    if title is not None and tables.items is not None:
        titles = tables.items.select("item_id", pl.col(title).cast(pl.String).alias("title"))
        items = items.join(titles, on="item_id", how="left", maintain_order="left")
    facets = _facets(task, tables)
    if facets is not None:
        items = items.join(facets, on="item_id", how="left", maintain_order="left")
    return vocab, items


def _facets(task: NextItem, tables: Tables) -> pl.DataFrame | None:
    """item_id and what items can be filtered by, as words or lists of words; None where there is nothing."""
    known = [] if tables.items is None else tables.items.columns
    if missing := [name for name in task.facets if name not in known]:
        raise DataError(
            f"the items have no column {', '.join(missing)}",
            where="items",
            expected="; ".join(known) if known else "a table of items",
            mend="correct NextItem.facets, or name the column in DataDir.columns",
        )
    names = [name for name in ("domain", *task.facets) if name in known]
    if tables.items is None or not names:
        return None
    schema = tables.items.schema
    return tables.items.select(
        "item_id", *(pl.col(n).cast(pl.List(pl.String) if isinstance(schema[n], pl.List) else pl.String) for n in names)
    )


def steps(rows: np.ndarray) -> tuple[Step, ...]:
    """From one user's events to an example, or none: item codes to table rows, the cut, known targets only."""
    return (
        Keep(_has_example, "without an example"),
        Lookup("items", rows),
        Change(make_example),
        Keep(_has_known_label, "target outside the catalogue"),
    )


def make_example(user: Example) -> Example:
    """The training example of a user, or, when `target_at` is there, the held-out one.

    Training has the events up to `train_end`; a held-out example has the event number `target_at` as label, all events
    before it, and as `future` the events from it on up to `target_end` (`future_events` many).
    """
    end = user["target_at"] if "target_at" in user else user["train_end"]
    example = {"user_index": user["user_index"], "items": user["items"][:end]}
    if "times" in user:
        example["times"] = user["times"][:end]
    if "target_at" in user:
        example["label"] = user["items"][end]
        example["train_events"] = user["train_end"]
        example["future"] = user["items"][end : user["target_end"]]
        example["future_events"] = user["target_end"] - end
        if "times" in user:
            example["label_time"] = user["times"][end]
            example["future_times"] = user["times"][end : user["target_end"]]
    return example


def _has_example(user: Example):
    """A single training event has no target, and a target without anything before it cannot be predicted."""
    return user["target_at"] >= 1 if "target_at" in user else user["train_end"] >= 2


def _has_known_label(example: Example):
    return example["label"] != OOV if "label" in example else True


def _schema(times: bool, held_out: bool = False) -> tuple[Field, ...]:
    fields = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
    fields += [Field(name="times", dtype="int64", rank=1)] if times else []
    if held_out:
        fields += [Field(name="label", dtype="int32", rank=0), Field(name="train_events", dtype="int32", rank=0)]
        fields += [Field(name="future", dtype="int32", rank=1), Field(name="future_events", dtype="int32", rank=0)]
        timed = [Field(name="label_time", dtype="int64", rank=0), Field(name="future_times", dtype="int64", rank=1)]
        fields += timed if times else []
    return tuple(fields)


def _is_before(offsets: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool per event: whether it is among the first `end` of its user."""
    lengths = np.diff(offsets)
    number = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return number < np.repeat(end, lengths)


def _counts(log: Histories, cuts: Cuts, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """How many examples each split has, what was left out and why, and what else is odd."""
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
        "events_outside_catalogue": int((rows[log.items] < FIRST_ITEM).sum()),
    }
    return counts


def _seen_before(log: Histories, users: np.ndarray, at: np.ndarray) -> int:
    """How many of these users have their target among the events before it."""
    target = np.full(len(log.lengths), -1, np.int64)
    end = np.zeros(len(log.lengths), np.int64)
    target[users], end[users] = log.items[log.offsets[users] + at], at
    repeated = _is_before(log.offsets, end) & (log.items == np.repeat(target, log.lengths))
    user = np.repeat(np.arange(len(log.lengths)), log.lengths)
    return len(np.unique(user[repeated]))
