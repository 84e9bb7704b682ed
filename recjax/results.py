"""What an evaluation found: every system's rank for every user, and the numbers made from them.

The ranks are kept, because everything else follows from them: metrics, intervals, buckets and a paired comparison
with another run on the same users (`recjax.result_files`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.metrics.bootstrap import intervals
from recjax.metrics.buckets import ITEM_BUCKETS, USER_BUCKETS
from recjax.metrics.topk import per_user
from recjax.slices import Task

FORMAT = 1
# What two results must share to stand in one table. A model that knows when the target happens has an easier task.
SAME = ("examples_hash", "split", "seen", "target_time_used", "sampled_candidates")


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One way of ranking.

    `rank` int32 [n] is in the order of the user number; `values` are means over users. `nll` [n] is the negative
    log-likelihood of the target in nats, where the system has one; `sampled_rank` int32 [n] the rank among sampled
    candidates, where there are any; `best` int32 [n] the row that comes first. `recommended` are the best rows of a
    few users, `settings` the hyper-parameters that were chosen, `seconds` what it took, fitting included. `by_user` are
    the metrics of each user [n] of a system that ranks no catalogue; its ranks then say nothing.
    """

    rank: np.ndarray
    values: Mapping[str, float]
    nll: np.ndarray | None = None
    sampled_rank: np.ndarray | None = None
    by_user: Mapping[str, np.ndarray] | None = None
    best: np.ndarray | None = None
    recommended: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def per_user(self, ks: Sequence[int]) -> dict[str, np.ndarray]:
        """Every metric that is a mean over users, [n] in the order of the user number."""
        if self.by_user is not None:
            return dict(self.by_user)
        return per_user_values(self.rank, ks, nll=self.nll, sampled_rank=self.sampled_rank)


def per_user_values(
    rank: np.ndarray, ks: Sequence[int], *, nll: np.ndarray | None = None, sampled_rank: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The metrics of each user from what ranking found: those of the rank, `nll`, and `sampled_...`."""
    values: dict[str, np.ndarray] = dict(per_user(rank, ks))
    if nll is not None:
        values["nll"] = nll.astype(np.float64)
    if sampled_rank is not None:
        values |= {f"sampled_{name}": value for name, value in per_user(sampled_rank, ks).items()}
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Systems side by side over the same users; the first is the one that the others are compared with.

    `cluster` int64 [n] numbers what is resampled together, such as the answers to one query; None: each user alone.
    """

    systems: Mapping[str, System]
    user_index: np.ndarray
    label: np.ndarray
    item_bucket: np.ndarray
    user_bucket: np.ndarray
    ks: Sequence[int]
    bootstrap_samples: int
    seed: int
    protocol: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]] = ()
    hard: Mapping[str, Task] = dataclasses.field(default_factory=dict)
    cluster: np.ndarray | None = None

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json; computed once."""
        return self._metrics

    def clusters(self, user_index: np.ndarray) -> np.ndarray | None:
        """The cluster of some of the users, if they have any."""
        return None if self.cluster is None else self.cluster[np.searchsorted(self.user_index, user_index)]

    @functools.cached_property
    def _metrics(self) -> dict[str, Any]:
        bounds, differences = self._intervals()
        drawn: Any = {"samples": self.bootstrap_samples, "seed": self.seed, "clusters": self.clusters}
        return {
            "format": FORMAT,
            "protocol": dict(self.protocol),
            "rows": {name: dict(system.values) for name, system in self.systems.items()},
            "intervals": bounds,
            "differences": differences,
            "buckets": self._buckets(),
            "hard": {n: t.metrics(**drawn) for n, t in self.hard.items()},
            "settings": {name: dict(s.settings) for name, s in self.systems.items() if s.settings},
            "seconds": {name: round(s.seconds, 3) for name, s in self.systems.items()},
            "users_per_second": {n: round(len(s.rank) / s.seconds) for n, s in self.systems.items() if s.seconds > 0},
            "samples": [dict(sample) for sample in self.samples],
        }

    def _intervals(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Bounds of every mean, and of the first system's difference to every other, from the same draws of users."""
        names = list(self.systems)
        values = {name: self.systems[name].per_user(self.ks) for name in names}
        columns = [(name, metric) for name in names for metric in values[name]]
        matrix = [values[name][metric] for name, metric in columns]
        against = [(name, metric) for name in names[1:] for metric in values[name] if metric in values[names[0]]]
        matrix += [values[names[0]][metric] - values[name][metric] for name, metric in against]
        found = intervals(
            np.stack(matrix, axis=1), clusters=self.cluster, samples=self.bootstrap_samples, seed=self.seed
        )
        bounds: dict[str, Any] = {name: {} for name in names}
        differences: dict[str, Any] = {name: {} for name in names[1:]}
        for (name, metric), interval in zip(columns, found, strict=False):
            bounds[name][metric] = [interval.low, interval.high]
        for (name, metric), interval in zip(against, found[len(columns) :], strict=True):
            differences[name][metric] = dataclasses.asdict(interval)
        return bounds, differences

    def _buckets(self) -> dict[str, Any]:
        """Metrics over the users of each bucket that has any."""
        groups = {f"item/{name}": self.item_bucket == i for i, name in enumerate(ITEM_BUCKETS)}
        groups |= {f"user/{name}": self.user_bucket == i for i, name in enumerate(USER_BUCKETS)}
        out = {}
        for group, members in groups.items():
            if members.any():
                rows = {
                    name: {metric: float(v[members].mean()) for metric, v in s.per_user(self.ks).items()}
                    for name, s in self.systems.items()
                }
                out[group] = {"users": int(members.sum()), "rows": rows}
        return out
