"""Results on disk: `metrics.json`, the numbers and the protocol they were taken under, and `per_user.npz`, the values
of every user they were made from, by which runs are compared. Files are written beside and then renamed.

Both together are the whole result, so that an evaluation that stands is read and not taken again (`load`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError
from recjax.metrics.bootstrap import Interval, intervals
from recjax.results import SAME, Result, System, per_user_values
from recjax.slices import Group, Task

METRICS, PER_USER = "metrics.json", "per_user.npz"
_OF = "of"  # what a result was taken of, in per_user.npz
_BUCKETS = ("item_bucket", "user_bucket")


def save(result: Result, folder: Path, *, of: str = "") -> Path:
    """Write metrics.json and per_user.npz into `folder`; returns the former. `of` says what was evaluated (`load`)."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {key: result.protocol.get(key) for key in (*SAME, "k")}
    about |= {_OF: of, "bootstrap_samples": result.bootstrap_samples, "seed": result.seed}
    arrays: dict[str, Any] = {name: getattr(result, name) for name in ("user_index", "label", *_BUCKETS)}
    for name, system in result.systems.items():
        arrays[f"rank/{name}"] = system.rank.astype(np.int32)
        arrays |= {f"by_user/{name}/{m}": values for m, values in (system.by_user or {}).items()}
        if system.nll is not None:
            arrays[f"nll/{name}"] = system.nll
        if system.sampled_rank is not None:
            arrays[f"sampled_rank/{name}"] = system.sampled_rank.astype(np.int32)
    if result.cluster is not None:
        arrays["cluster"] = result.cluster
    for task, found in result.hard.items():
        for group, users in found.groups.items():
            arrays[f"hard/{task}/{group}/user_index"] = users.user_index
            for name, columns in users.values.items():
                arrays |= {f"hard/{task}/{group}/{name}/{m}": values for m, values in columns.items()}
    beside = _beside(folder / PER_USER)
    with open(beside, "wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
    (folder / METRICS).unlink(missing_ok=True)  # never the numbers of one result beside the users of another
    os.replace(beside, folder / PER_USER)
    return write_json(folder / METRICS, result.metrics())


def load(folder: Path, *, of: str) -> Result | None:
    """The result that `save` wrote here of the same; None where there is none, or one that cannot be read.

    `best` and `recommended` of a system, of which `samples` tell, are not kept.
    """
    try:
        arrays = _load(folder)
        if arrays["about"].get(_OF) != of:
            return None
        told = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return _result(arrays, told)
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _result(arrays: Mapping[str, Any], told: Mapping[str, Any]) -> Result:
    """A result from what its two files hold; raises `KeyError` where something is not in them."""
    numbers = {name: _numbers(told[name]) for name in ("rows", "intervals", "differences", "buckets", "hard")}
    systems = {}
    for name, values in numbers["rows"].items():
        by_user = _below(arrays, f"by_user/{name}/")
        systems[name] = System(
            rank=arrays[f"rank/{name}"],
            values=values,
            nll=arrays.get(f"nll/{name}"),
            sampled_rank=arrays.get(f"sampled_rank/{name}"),
            by_user=by_user or None,
            settings=told["settings"].get(name, {}),
            seconds=told["seconds"][name],
        )
    about = arrays["about"]
    found = Result(
        systems=systems,
        user_index=arrays["user_index"],
        label=arrays["label"],
        **{name: arrays[name] for name in _BUCKETS},
        ks=about["k"],
        bootstrap_samples=about["bootstrap_samples"],
        seed=about["seed"],
        protocol=told["protocol"],
        samples=told["samples"],
        hard={name: _task(arrays, f"hard/{name}/", task) for name, task in numbers["hard"].items()},
        cluster=arrays.get("cluster"),
    )
    vars(found)["_metrics"] = {**told, **numbers}  # what the cached property would find again, drawing anew
    return found


def _task(arrays: Mapping[str, Any], prefix: str, told: Mapping[str, Any]) -> Task:
    groups = {}
    for name, group in told["groups"].items():
        here = f"{prefix}{name}/"
        values = {system: _below(arrays, f"{here}{system}/") for system in group["rows"]}
        whole = {s: {m: v for m, v in row.items() if m not in values[s]} for s, row in group["rows"].items()}
        groups[name] = Group(user_index=arrays[f"{here}user_index"], values=values, whole=whole)
    return Task(about=told["about"], groups=groups, shown=tuple(told["shown"]))


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _numbers(value: Any) -> Any:
    """What `write_json` made null is no number."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float("nan") if value is None else value


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
        by_user = {name: v.astype(np.float64) for name, v in _below(result, f"by_user/{system}/").items()}
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
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
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
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
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
