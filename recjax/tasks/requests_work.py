"""What a task of requests does with tables: a log of requests, groups of users, and then what any impressions do."""

from __future__ import annotations

import numpy as np
import polars as pl

from recjax.data.impression_log import ImpressionLog
from recjax.data.requests_log import TASK, requests_of
from recjax.data.tables import Tables
from recjax.data.user_clusters import user_clusters
from recjax.tasks import impressions_work
from recjax.tasks.requests import Requests
from recjax.tasks.work import Work


def make_work(task: Requests, tables: Tables) -> Work:
    """The work of `task` on these tables; raises `DataError` as `Requests.work` says."""
    rows = requests_of(tables, kinds=task.kinds, min_label=task.min_label, keys=task.keys, seed=task.seed)
    sides = {name: frame for name in ("items", "users") if (frame := getattr(tables, name)) is not None}
    if task.clusters:
        groups = _clusters(task, tables, rows)
        sides["users"] = sides["users"].join(groups, on="user_id", how="left") if "users" in sides else groups
    counts = ", ".join(f"{count:,} {kind}" for kind, count in rows.group_by(TASK).len().sort(TASK).iter_rows())
    log = ImpressionLog(
        rows=rows,
        sides=sides,
        vectors=tables.vectors,
        simulated=tables.simulated,
        notes=(*tables.notes, f"requests: {counts}"),
        warnings=tables.warnings,
    )
    return impressions_work.make_work(task, log)


def _clusters(task: Requests, tables: Tables, rows: pl.DataFrame) -> pl.DataFrame:
    """user_id and cluster ("1", "2", ...) of those who had something before the first request that is held out."""
    times = np.sort(rows["timestamp"].to_numpy())
    cut = times[int(len(times) * (1 - task.test_fraction - task.valid_fraction))]
    events = tables.interactions.filter(pl.col("timestamp") < int(cut))
    users, items = (events[name].unique(maintain_order=True) for name in ("user_id", "item_id"))
    numbers = [
        events.select(name)
        .join(pl.DataFrame({name: ids}).with_row_index("number"), on=name, how="left", maintain_order="left")["number"]
        .to_numpy()
        .astype(np.int64)
        for name, ids in (("user_id", users), ("item_id", items))
    ]
    group = user_clusters(*numbers, users=len(users), items=len(items), clusters=task.clusters, seed=task.seed)
    # "0" is for those who are in no group.
    return pl.DataFrame({"user_id": users, "cluster": [str(number + 1) for number in group.tolist()]})
