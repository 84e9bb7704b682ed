"""Finds what a ranking task in words asks about next items, and makes next-item examples of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from recjax.data.impression_log import SPLITS
from recjax.data.record import Column, Field, RawColumns, Runs
from recjax.data.tables import Tables
from recjax.data.vocab import ItemVocab
from recjax.tasks.asked_next import AskedNext
from recjax.tasks.next_item_work import divide, work_of
from recjax.tasks.prompted_log import Log, read_log
from recjax.tasks.ranked_questions import next_items
from recjax.tasks.work import Work


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Of each user [n]: the place of the target (-1: not asked), how many events are told before it, the candidates.

    The latter are numbers of the log's items, the target's first.
    """

    target: np.ndarray
    told: np.ndarray
    items: list[list[int]]


def make_work(task: AskedNext, tables: Tables) -> Work:
    """The work of `task` on these tables; raises what `AskedNext.work_on` says."""
    log = read_log(task.asked.wording, task.asked.periods, tables)
    period = pl.Series("split", np.array(SPLITS)[log.period])
    divided = divide(task, tables.interactions.with_columns(period))
    asked = {name: _asked(task, log, divided.log.user_ids, number) for number, name in enumerate(SPLITS) if number}
    cuts = replace(divided.cuts, valid_at=asked["valid"].target, test_at=asked["test"].target)
    work = work_of(task, tables, replace(divided, cuts=cuts))
    return replace(
        work,
        raw={**work.raw, **{name: _columns(one, log, work.vocab, work.raw[name]) for name, one in asked.items()}},
        schemas={
            **work.schemas,
            **{name: (*work.schemas[name], Field(name="asked", dtype="int32", rank=1)) for name in asked},
        },
        facts={
            **work.facts,
            "asked": task.asked.name,
            "split_rule": f"what is asked by {task.asked.name}: {log.rule}",
        },
    )


def _asked(task: AskedNext, log: Log, user_ids: pl.Series, period: int) -> _Asked:
    """What is asked in a period of the users `user_ids`."""
    number = {user: k for k, user in enumerate(user_ids.to_list())}
    target, told = np.full(len(number), -1), np.zeros(len(number), np.int64)
    items: list[list[int]] = [[] for _ in number]
    users = log.user_ids.to_list()
    for user, event, candidates in next_items(task.asked, log)(period):
        mine, first = number[users[user]], log.offsets[user]
        target[mine], told[mine], items[mine] = event - first, log.before[event] - first, candidates
    return _Asked(target=target, told=told, items=items)


def _columns(asked: _Asked, log: Log, vocab: ItemVocab, columns: RawColumns) -> dict[str, Column | Runs]:
    """Held-out examples whose histories end where the prompt does, with the rows of their candidates."""
    users = columns["user_index"].values
    told, candidates = asked.told[users], [asked.items[user] for user in users.tolist()]
    rows = vocab.encode(log.item_ids)[np.concatenate([np.zeros(0, np.int64), *candidates]).astype(np.int64)]
    found = {**columns, "asked": Column(rows, _offsets(np.array([len(one) for one in candidates], np.int64)))}
    for name in ("items", "times"):
        if name in columns:
            found[name] = replace(columns[name], lengths=told)
    return found


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
