"""Stages compared side by side: the arms of an experiment, each trained with the same seeds.

An arm's value is the mean over its seeds. Its difference to the first arm is taken per user, averaged over the seeds
they share, and bootstrapped over users: the interval says how far the difference would move with other users, and
the spread over seeds stands beside it. Arms whose models know the time of the target stand in a table of their own,
as do arms evaluated on other examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.metrics.bootstrap import intervals
from recjax.metrics.topk import per_user
from recjax.results import SAME, Result
from recjax.tables import Table, number, signed

MODEL = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One stage, trained with some seeds: what its header calls it and what evaluation found for each seed."""

    name: str
    title: str
    results: Mapping[int, Result]

    @property
    def condition(self) -> tuple[Any, ...]:
        """What arms of one table share."""
        protocol = next(iter(self.results.values())).protocol
        return tuple(protocol.get(key) for key in SAME)

    @property
    def knows_target_time(self) -> bool:
        """Whether the model is told when the target happens."""
        return bool(next(iter(self.results.values())).protocol.get("target_time_used"))

    def seed_values(self, metric: str) -> list[float]:
        """The metric of each seed."""
        return [result.systems[MODEL].values[metric] for result in self.results.values()]

    def users(self, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        """Metrics of each user, averaged over seeds; users in order of their number."""
        found = [per_user(self.results[s].systems[MODEL].rank, self.results[s].ks) for s in seeds]
        return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}


def groups(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms that may stand in one table, in order of their first."""
    found: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.condition, []).append(arm)
    return list(found.values())


def compare_arms(arms: Sequence[Arm], *, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean, seeds and difference to the first arm, of every metric, for arms of one condition.

    Raises `ValueError` for arms of different conditions or without a seed in common.
    """
    if len(groups(arms)) != 1:
        raise ValueError("arms of different conditions cannot be compared")
    first, rows = arms[0], {}
    for arm in arms:
        shared = [s for s in arm.results if s in first.results]
        if not shared:
            raise ValueError(f"{arm.name} and {first.name} have no seed in common")
        values = next(iter(arm.results.values())).systems[MODEL].values
        row: dict[str, Any] = {
            "title": arm.title,
            "values": {m: float(np.mean(arm.seed_values(m))) for m in values},
            "per_seed": {str(s): dict(r.systems[MODEL].values) for s, r in arm.results.items()},
        }
        if arm is not first:
            ours, theirs = arm.users(shared), first.users(shared)
            names = [name for name in ours if name in theirs]
            matrix = np.stack([ours[name] - theirs[name] for name in names], axis=1)
            bounds = intervals(matrix, samples=samples, seed=seed)
            row["difference"] = {name: dataclasses.asdict(b) for name, b in zip(names, bounds, strict=True)}
        rows[arm.name] = row
    return {"target_time_used": first.knows_target_time, "first": first.name, "arms": rows}


def arms_table(found: Mapping[str, Any], k: int = 10) -> Table:
    """One row for each arm: metrics, their spread over seeds, differences to the first arm with intervals."""
    first = next(iter(found["arms"].values()))["values"]
    names = [name for name in (f"recall@{k}", f"ndcg@{k}", "mrr", "nll") if name in first]
    differed = [f"recall@{k}", f"ndcg@{k}"]
    rows = []
    for name, row in found["arms"].items():
        cells = [name]
        for metric in names:
            seeds = [values[metric] for values in row["per_seed"].values()]
            spread = f" ±{number(float(np.std(seeds, ddof=1)))}" if len(seeds) > 1 else ""
            cells.append(number(row["values"][metric]) + spread)
        for metric in differed:
            d = row.get("difference", {}).get(metric)
            cells.append(f"{signed(d['mean'])} [{signed(d['low'])}, {signed(d['high'])}]" if d else "")
        rows.append(cells)
    header = ["", *names, *(f"{metric} - {found['first']}" for metric in differed)]
    kind = "told the time of the target" if found["target_time_used"] else "without the time of the target"
    return Table(title=f"Arms ({kind})", header=header, rows=rows)
