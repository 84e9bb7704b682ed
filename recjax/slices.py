"""Results on parts of the users and on changed inputs: a task with its groups, every system's metrics in each.

A group is a set of users with one value per user, system and metric; means and intervals follow from those, and so do
paired comparisons between runs. Which groups a task has is decided in `recjax.hard`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from recjax.metrics.bootstrap import intervals

# User numbers to the clusters they are resampled in, None for each alone.
Clusters = Callable[[np.ndarray], np.ndarray | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """`values[system][metric]` float [n], entry i of user `user_index[i]`; `whole` are metrics of all of them together.

    Coverage, for example, is no mean over users.
    """

    user_index: np.ndarray
    values: Mapping[str, Mapping[str, np.ndarray]]
    whole: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def metrics(self, *, samples: int, seed: int, clusters: Clusters) -> dict[str, Any]:
        """Users, means, and the bootstrap interval of every mean."""
        found_clusters = clusters(self.user_index)
        rows: dict[str, Any] = {}
        bounds: dict[str, Any] = {}
        for system, columns in self.values.items():
            found = intervals(
                np.stack(list(columns.values()), axis=1), clusters=found_clusters, samples=samples, seed=seed
            )
            rows[system] = {name: i.mean for name, i in zip(columns, found, strict=True)}
            rows[system] |= self.whole.get(system, {})
            bounds[system] = {name: [i.low, i.high] for name, i in zip(columns, found, strict=True)}
        return {"users": len(self.user_index), "rows": rows, "intervals": bounds}

    def take(self, chosen: np.ndarray) -> Group:
        """Some of the users; what is no mean over users is left out."""
        parts = {s: {name: v[chosen] for name, v in columns.items()} for s, columns in self.values.items()}
        return Group(user_index=self.user_index[chosen], values=parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """`about` says what is measured and how, `shown` which metrics are worth a column; empty groups are left out."""

    about: str
    groups: Mapping[str, Group]
    shown: tuple[str, ...] = ()

    def metrics(self, *, samples: int, seed: int, clusters: Clusters) -> dict[str, Any]:
        """The task's part of metrics.json."""
        found = {name: group for name, group in self.groups.items() if len(group.user_index)}
        groups = {name: group.metrics(samples=samples, seed=seed, clusters=clusters) for name, group in found.items()}
        return {"about": self.about, "shown": list(self.shown), "groups": groups}
