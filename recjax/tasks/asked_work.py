"""Finds the rows that a ranking task in words asks about, and hands them to the work of rows with labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.impression_log import SPLITS, ImpressionLog
from recjax.data.tables import Tables
from recjax.tasks import impressions_work
from recjax.tasks.asked_rows import ASKED, AskedRows
from recjax.tasks.prompted_log import RATINGS, TRAIN, read_log
from recjax.tasks.ranked_questions import rated_events
from recjax.tasks.work import Work


def make_work(task: AskedRows, tables: Tables) -> Work:
    """The work of `task` on these tables; raises what `AskedRows.work` says."""
    if not tables.has_times:
        raise DataError("rows of what is asked need times", where="interactions", expected="a column timestamp")
    log = read_log(task.asked.wording, task.asked.periods, tables)
    count = len(log.item)
    split = np.full(count, TRAIN, np.int8)
    asked = (log.period == TRAIN) & ~np.isnan(log.rating)
    times = tables.interactions["timestamp"].to_numpy().astype(np.int64).copy()
    for period in range(1, len(SPLITS)):
        for _, events in rated_events(task.asked, log, period):
            split[events], asked[events] = period, True
            times[events] = times[events[0]]
    frame = tables.interactions.with_columns(
        pl.Series("split", np.array(SPLITS)[split]),
        pl.Series(ASKED, asked.astype(np.int64)),
        pl.Series("timestamp", times),
    )
    if "rating" not in frame.columns:
        frame = frame.rename({name: "rating" for name in RATINGS if name in frame.columns})
    work = impressions_work.make_work(
        task,
        ImpressionLog(
            rows=frame,
            sides={name: side for name in ("items", "users") if (side := getattr(tables, name)) is not None},
            vectors=tables.vectors,
            simulated=tables.simulated,
            notes=tables.notes,
            warnings=tables.warnings,
        ),
    )
    rule = f"what is asked by {task.asked.name}: {log.rule}"
    return replace(work, facts={**work.facts, "split_rule": rule})
