"""Stages compared side by side: the arms of an experiment, each trained with the same seeds.

An arm's value is the mean over its seeds. Its difference to the first arm, or to the one it names, is taken per user,
averaged over the seeds they share, and bootstrapped over users (over queries where examples have one): the interval
says how far the difference would move with other users, and the spread over seeds stands beside it. Arms whose models
know the time of the target stand in a table of their own, as do arms evaluated on other examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError
from recjax.metrics.bootstrap import intervals
from recjax.results import SAME, Result
from recjax.slices import Group
from recjax.tables import Table, number, signed

MODEL = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One stage, trained with some seeds: what its header calls it and what evaluation found for each seed.

    `against` is the arm that it is compared with; "" is the first of all.
    """

    name: str
    title: str
    results: Mapping[int, Result]
    against: str = ""

    @property
    def condition(self) -> tuple[Any, ...]:
        """What arms of one table share."""
        protocol = next(iter(self.results.values())).protocol
        return tuple(protocol.get(key) for key in SAME)

    @property
    def task(self) -> str:
        """What it was evaluated on."""
        return str(next(iter(self.results.values())).protocol.get("task"))

    @property
    def knows_target_time(self) -> bool:
        """Whether the model is told when the target happens."""
        return bool(next(iter(self.results.values())).protocol.get("target_time_used"))

    def seed_values(self, metric: str) -> list[float]:
        """The metric of each seed."""
        return [result.systems[MODEL].values[metric] for result in self.results.values()]

    def users(self, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        """Metrics of each user, averaged over seeds; users in order of their number."""
        return _mean([self.results[s].systems[MODEL].per_user(self.results[s].ks) for s in seeds])

    def hard_groups(self, seeds: Sequence[int]) -> dict[tuple[str, str], tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(task, group) -> users and their metrics averaged over seeds, for groups of the same users in all seeds."""
        found: dict[tuple[str, str], list[Group]] = {}
        for seed in seeds:
            for task, part in self.results[seed].hard.items():
                for name, group in part.groups.items():
                    if MODEL in group.values:
                        found.setdefault((task, name), []).append(group)
        return {
            key: (same[0].user_index, _mean([group.values[MODEL] for group in same]))
            for key, same in found.items()
            if len(same) == len(seeds) and all(np.array_equal(g.user_index, same[0].user_index) for g in same)
        }


def groups(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms that may stand in one table, in order of their first.

    A stage that was asked the same questions as several tasks (with longer and shorter prompts, say) has a table for
    each of them.
    """
    found: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.condition, []).append(arm)
    out: list[list[Arm]] = []
    for same in found.values():
        if len({arm.name for arm in same}) == len(same):
            out.append(same)
        else:
            by_task: dict[str, list[Arm]] = {}
            for arm in same:
                by_task.setdefault(arm.task, []).append(arm)
            out += by_task.values()
    return out


def compare_arms(arms: Sequence[Arm], *, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean, seeds and difference to the first arm, or the one it names, of every metric, for arms of one condition.

    Raises `ValueError` for arms of different conditions or without a seed in common, `ConfigError` for an arm that is
    to be compared with one that is not among them.
    """
    if len(groups(arms)) != 1:
        raise ValueError("arms of different conditions cannot be compared")
    first, rows = arms[0], {}
    one = next(iter(first.results.values()))
    everyone, by_name = one.clusters(one.user_index), {arm.name: arm for arm in arms}
    for arm in arms:
        base = by_name.get(arm.against or first.name)
        if base is None:
            known = ", ".join(by_name)
            raise ConfigError(f"the arm {arm.name} is against {arm.against}", where="against:", expected=known)
        shared = [s for s in arm.results if s in base.results]
        if not shared:
            raise ValueError(f"{arm.name} and {base.name} have no seed in common")
        values = next(iter(arm.results.values())).systems[MODEL].values
        row: dict[str, Any] = {
            "title": arm.title,
            "values": {m: float(np.mean(arm.seed_values(m))) for m in values},
            "per_seed": {str(s): dict(r.systems[MODEL].values) for s, r in arm.results.items()},
        }
        if arm is not base:
            row["against"] = base.name
            row["difference"] = _difference(arm.users(shared), base.users(shared), everyone, samples, seed)
        row["hard"], theirs = {}, base.hard_groups(shared)
        for (task, group), (users, values) in arm.hard_groups(shared).items():
            part: dict[str, Any] = {"values": {name: float(v.mean()) for name, v in values.items() if len(v)}}
            other = theirs.get((task, group))
            if arm is not base and len(users) and other is not None and np.array_equal(users, other[0]):
                part["difference"] = _difference(values, other[1], one.clusters(users), samples, seed)
            row["hard"].setdefault(task, {})[group] = part
        rows[arm.name] = row
    shown = {task: list(part.shown) for task, part in one.hard.items()}
    known = {
        "task": first.task,
        "target_time_used": first.knows_target_time,
        "metrics": one.protocol.get("metrics", []),
    }
    return {**known, "first": first.name, "shown": shown, "arms": rows}


def _mean(found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}


def _difference(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    clusters: np.ndarray | None,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Metric -> mean of ours - theirs over the same users, and its interval."""
    names = [name for name in ours if name in theirs]
    matrix = np.stack([ours[name] - theirs[name] for name in names], axis=1)
    found = intervals(matrix, clusters=clusters, samples=samples, seed=seed)
    return {name: dataclasses.asdict(interval) for name, interval in zip(names, found, strict=True)}


def arms_table(found: Mapping[str, Any], k: int = 10) -> Table:
    """One row for each arm: metrics, their spread over seeds, differences to the first arm with intervals.

    Where an arm is compared with another one a column says with which.
    """
    first = next(iter(found["arms"].values()))["values"]
    wanted = dict.fromkeys([f"recall@{k}", f"ndcg@{k}", "mrr", "nll", *found["metrics"]])
    names = [name for name in wanted if name in first]
    differed, rows = found["metrics"] or [f"recall@{k}", f"ndcg@{k}"], []
    bases = dict.fromkeys(row["against"] for row in found["arms"].values() if "against" in row)
    several = list(bases) not in ([], [found["first"]])
    for name, row in found["arms"].items():
        cells = [name]
        for metric in names:
            seeds = [values[metric] for values in row["per_seed"].values()]
            spread = f" ±{number(float(np.std(seeds, ddof=1)))}" if len(seeds) > 1 else ""
            cells.append(number(row["values"][metric]) + spread)
        cells += [row.get("against", "")] * several
        for metric in differed:
            cells.append(_bounded(row.get("difference", {}).get(metric)))
        rows.append(cells)
    against = "that of the arm" if several else found["first"]
    header = ["", *names, *["compared with"] * several, *(f"{metric} - {against}" for metric in differed)]
    kind = "told the time of the target" if found["target_time_used"] else "without the time of the target"
    return Table(title=f"Arms on {found['task']} ({kind})", header=header, rows=rows)


def arms_hard_table(found: Mapping[str, Any]) -> Table:
    """Every shown metric of every hard task and group down, the arms across: value, difference, interval."""
    arms = found["arms"]
    rows = []
    for task, shown in found["shown"].items():
        for group in arms[found["first"]]["hard"].get(task, {}):
            parts = [row["hard"].get(task, {}).get(group, {}) for row in arms.values()]
            for metric in shown:
                cells = [
                    f"{number(part['values'].get(metric))} {_bounded(part.get('difference', {}).get(metric))}".strip()
                    if metric in part.get("values", {})
                    else ""
                    for part in parts
                ]
                if any(cells):
                    rows.append([f"{task.replace('_', ' ')}, {group}: {metric}", *cells])
    title = f"Hard tasks of the arms on {found['task']}, with the difference to the first"
    return Table(title=title, header=["", *arms], rows=rows)


def _bounded(difference: Mapping[str, float] | None) -> str:
    """A difference and its interval."""
    if not difference:
        return ""
    low, high = signed(difference["low"]), signed(difference["high"])
    return f"{signed(difference['mean'])} [{low}, {high}]"
