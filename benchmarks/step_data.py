"""Batches for the train-step benchmark, and the loop every worker answers with; numpy and polars only.

Each worker process prints one line of facts, then reads a number of steps per line and prints what they took.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recjax.data.packing import one_per_row, pack

FIRST_ITEM = 2
BATCHES = 16


def options() -> argparse.Namespace:
    """What every worker is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["sasrec", "hstu"], default="sasrec")
    parser.add_argument("--loss", choices=["full", "sampled"], required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=8)
    return parser.parse_args()


def histories(data: str) -> tuple[list[np.ndarray], int]:
    """Training histories as table rows (the last two events of each user are held out), and the number of items."""
    if data:
        import polars as pl

        log = pl.read_parquet(Path(data) / "interactions.parquet")
        log = log.sort("user_id", "position" if "position" in log.columns else "timestamp", maintain_order=True)
        rows = log["item_id"].rank("dense").cast(pl.Int32) - 1 + FIRST_ITEM
        groups = log.with_columns(row=rows).group_by("user_id", maintain_order=True).agg("row")["row"]
        return [np.asarray(g, np.int32)[:-2] for g in groups.to_list()], int(rows.max()) + 1 - FIRST_ITEM
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(95), 1.0, 6040), 18, 2275).astype(int)
    chance = 1 / np.arange(10, 3426)
    return [draw.choice(3416, n, p=chance / chance.sum()).astype(np.int32) + FIRST_ITEM for n in lengths], 3416


def batches(
    users: list[np.ndarray], rows: int, length: int, *, packed: bool, timed: bool = False
) -> list[dict[str, np.ndarray]]:
    """The newest `length` inputs and targets of every user, in a seeded order, cut into batches of `rows` rows.

    `timed` adds `history_time`, drawn: from one event to the next it takes seconds to weeks.
    """
    draw = np.random.default_rng(1)
    users = [users[i][-length - 1 :] for i in draw.permutation(len(users))]
    sizes = np.array([len(u) - 1 for u in users])
    plan = pack(sizes, length) if packed else one_per_row(len(users))
    order = draw.permutation(plan.num_rows)
    names = ("history_ids", "target_ids", "positions", "segment_ids")
    whole = {name: np.zeros((plan.num_rows, length), np.int32) for name in names}
    if timed:
        whole["history_time"] = np.zeros((plan.num_rows, length), np.int32)
    for items, size, row, offset, segment in zip(users, sizes, plan.row, plan.offset, plan.segment, strict=True):
        at = order[row], slice(offset, offset + size)
        whole["history_ids"][at], whole["target_ids"][at] = items[:-1], items[1:]
        whole["positions"][at], whole["segment_ids"][at] = np.arange(size), segment
        if timed:
            whole["history_time"][at] = np.cumsum(np.exp(draw.uniform(0, np.log(1e6), size)))
    whole["weight"] = (whole["target_ids"] > 0).astype(np.float32)
    count = min(BATCHES, plan.num_rows // rows)
    return [{k: v[i * rows : (i + 1) * rows] for k, v in whole.items()} for i in range(count)]


def serve(facts: dict, targets: list[int], step: Callable[[int], float]) -> None:
    """Warm up, then run steps as told; `step(i)` trains on batch i and returns the loss, which ends the step."""
    for i in range(2):
        step(i)
    print(json.dumps(facts), flush=True)
    done = 0
    for line in sys.stdin:
        seconds, seen = 0.0, 0
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step(done % len(targets))
            seconds += time.perf_counter() - start
            assert np.isfinite(loss)
            seen += targets[done % len(targets)]
            done += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "targets": seen, "peak_mib": peak}), flush=True)


def fill(parts: list[dict[str, np.ndarray]]) -> float:
    """Share of the slots that have a target."""
    return float(np.mean([b["weight"].mean() for b in parts]))
