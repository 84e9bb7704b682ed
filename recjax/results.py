"""What an evaluation found: every system's rank for every user, and the numbers made from them.

The ranks are kept (`per_user.npz`), because everything else follows from them: metrics, intervals, buckets and a
paired comparison with another run on the same users. `metrics.json` holds the numbers and the protocol they were
taken under. Files are written beside and then renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError
from recjax.metrics.bootstrap import Interval, intervals
from recjax.metrics.buckets import ITEM_BUCKETS, USER_BUCKETS
from recjax.metrics.topk import per_user
from recjax.slices import Task

METRICS, PER_USER = "metrics.json", "per_user.npz"
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

    def save(self, folder: Path) -> Path:
        """Write metrics.json and per_user.npz into `folder`; returns the former."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {key: self.protocol.get(key) for key in (*SAME, "k")}
        arrays: dict[str, Any] = {}
        for name, system in self.systems.items():
            arrays[f"rank/{name}"] = system.rank.astype(np.int32)
            arrays |= {f"by_user/{name}/{m}": v.astype(np.float32) for m, v in (system.by_user or {}).items()}
            if system.nll is not None:
                arrays[f"nll/{name}"] = system.nll.astype(np.float32)
            if system.sampled_rank is not None:
                arrays[f"sampled_rank/{name}"] = system.sampled_rank.astype(np.int32)
        if self.cluster is not None:
            arrays["cluster"] = self.cluster
        for task, found in self.hard.items():
            for group, users in found.groups.items():
                arrays[f"hard/{task}/{group}/user_index"] = users.user_index
                for name, columns in users.values.items():
                    shown = [metric for metric in found.shown if metric in columns]
                    arrays |= {f"hard/{task}/{group}/{name}/{m}": columns[m].astype(np.float32) for m in shown}
        beside = _beside(folder / PER_USER)
        with open(beside, "wb") as file:
            np.savez_compressed(
                file, user_index=self.user_index, label=self.label, about=np.array(json.dumps(about)), **arrays
            )
        os.replace(beside, folder / PER_USER)
        return write_json(folder / METRICS, self.metrics())

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


def write_json(path: Path, content: Any) -> Path:
    """Write JSON beside `path` and rename; a number that is not finite becomes null."""
    beside = _beside(path)
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the same users: metric -> mean of each, and the interval of the difference ours - theirs."""

    users: int
    ours: Mapping[str, float]
    theirs: Mapping[str, float]
    difference: Mapping[str, Interval]


def compare(ours: Path, theirs: Path, *, system: str = "model", samples: int = 1000, seed: int = 0) -> Comparison:
    """Paired bootstrap between the results saved in two folders.

    Raises `ConfigError` when a result is missing or the two were not taken on the same users, targets and protocol.
    """
    one, other = _load(ours), _load(theirs)
    for key in SAME:
        if one["about"].get(key) != other["about"].get(key):
            raise ConfigError(
                f"the runs differ in {key}: {one['about'].get(key)!r} and {other['about'].get(key)!r}",
                where=f"{ours}, {theirs}",
                expected="two evaluations under the same protocol",
                mend="evaluate both again on the same prepared examples and split",
            )
    same = all(np.array_equal(one[name], other[name]) for name in ("user_index", "label"))
    if not same:
        raise ConfigError(
            "the runs were evaluated on different users",
            where=f"{ours}, {theirs}",
            expected="the same max_users and seed of the evaluation",
        )
    ks = [k for k in one["about"]["k"] if k in other["about"]["k"]]
    values = []
    for folder, result in ((ours, one), (theirs, other)):
        if f"rank/{system}" not in result:
            known = ", ".join(name.removeprefix("rank/") for name in result if name.startswith("rank/"))
            raise ConfigError(f"no system {system!r} in this result", where=str(folder), expected=f"one of {known}")
        more = {name: result.get(f"{name}/{system}") for name in ("nll", "sampled_rank")}
        told = f"by_user/{system}/"
        by_user = {name.removeprefix(told): v.astype(np.float64) for name, v in result.items() if name.startswith(told)}
        values.append(by_user or per_user_values(result[f"rank/{system}"], ks, **more))
    names = [name for name in values[0] if name in values[1]]
    matrix = np.stack([values[0][name] - values[1][name] for name in names], axis=1)
    found = intervals(matrix, clusters=one.get("cluster"), samples=samples, seed=seed)
    return Comparison(
        users=len(one["user_index"]),
        ours={name: float(values[0][name].mean()) for name in names},
        theirs={name: float(values[1][name].mean()) for name in names},
        difference=dict(zip(names, found, strict=True)),
    )


def _load(folder: Path) -> dict[str, Any]:
    file = folder / PER_USER if folder.is_dir() else folder
    try:
        with np.load(file, allow_pickle=False) as arrays:
            loaded: dict[str, Any] = dict(arrays)
        return {
            **loaded,
            "about": {"target_time_used": False, "sampled_candidates": 0, **json.loads(str(loaded["about"]))},
        }
    except FileNotFoundError:
        raise ConfigError(
            "there is no evaluation here",
            where=str(file),
            expected=f"a folder with {PER_USER}",
            mend="run `recjax evaluate` on this run first",
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"the evaluation cannot be read: {error}", where=str(file), mend="run `recjax evaluate` again"
        ) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.integer | np.bool_) else value
