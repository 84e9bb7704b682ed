"""A result read from its two files is the one that was saved; anything else is not taken for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from recjax.metrics.topk import per_user
from recjax.result_files import METRICS, PER_USER, load, save
from recjax.results import Result, System
from recjax.slices import Group, Task

USERS = 40


def ranked() -> Result:
    """Ranks of a catalogue, with all that may come with them."""
    rng = np.random.default_rng(0)
    systems = {}
    for name in ("model", "popularity"):
        rank = rng.integers(0, 30, USERS).astype(np.int32)
        values = {metric: float(v.mean()) for metric, v in per_user(rank, (5, 10)).items()}
        systems[name] = System(rank=rank, values=values, seconds=1.25, settings={"steps": 10.0})
    nll = rng.normal(size=USERS).astype(np.float32)
    systems["model"] = dataclasses.replace(systems["model"], nll=nll, sampled_rank=rng.integers(0, 9, USERS, np.int32))
    group = Group(
        user_index=np.arange(0, USERS, 2) * 3,
        values={"model": {"recall@5": rng.random(USERS // 2), "ndcg@5": np.full(USERS // 2, np.nan)}},
        whole={"model": {"coverage@5": float("nan")}},
    )
    hard = {"long/tail": Task(about="what", groups={"a/b": group, "b (3 rows)": group}, shown=("recall@5",))}
    return result(systems, hard)


def judged() -> Result:
    """Metrics of users alone, one of which is not known."""
    rng = np.random.default_rng(1)
    by_user = {"auc": rng.random(USERS), "click/auc": np.full(USERS, np.nan)}
    values = {**{name: float(v.mean()) for name, v in by_user.items()}, "calibration_error": 0.1}
    return result({"model": System(rank=np.zeros(USERS, np.int32), by_user=by_user, values=values)}, {})


def result(systems: dict[str, System], hard: dict[str, Task]) -> Result:
    return Result(
        systems=systems,
        user_index=np.arange(USERS) * 3,
        label=np.arange(USERS),
        item_bucket=np.arange(USERS, dtype=np.int8) % 3,
        user_bucket=np.full(USERS, -1, np.int8),
        ks=(5, 10),
        bootstrap_samples=50,
        seed=3,
        protocol={"k": [5, 10], "split": "test", "seen": "removed", "max_users": None},
        samples=[{"user_index": 7}],
        hard=hard,
        cluster=np.arange(USERS) // 2,
    )


@pytest.mark.parametrize("made", [ranked(), judged()], ids=["ranked", "judged"])
def test_what_is_read_is_what_was_saved(made: Result, tmp_path: Path) -> None:
    save(made, tmp_path, of="this")
    found = load(tmp_path, of="this")
    assert found is not None
    np.testing.assert_equal(found.metrics(), json.loads(json.dumps(made.metrics())))
    vars(found).pop("_metrics")  # what it finds of the values of its users alone is the same
    np.testing.assert_equal(found.metrics(), made.metrics())
    for one in dataclasses.fields(Result):
        if one.name not in ("systems", "hard", "ks"):
            np.testing.assert_equal(getattr(found, one.name), getattr(made, one.name))
    for name, system in made.systems.items():
        np.testing.assert_equal(found.systems[name].per_user(found.ks), system.per_user(made.ks))
    for name, task in made.hard.items():
        for group, users in task.groups.items():
            np.testing.assert_equal(dataclasses.asdict(found.hard[name].groups[group]), dataclasses.asdict(users))


def test_another_and_a_damaged_one_are_none(tmp_path: Path) -> None:
    assert load(tmp_path, of="") is None
    save(ranked(), tmp_path, of="this")
    assert load(tmp_path, of="that") is None and load(tmp_path, of="") is None
    for name in (METRICS, PER_USER):
        whole = (tmp_path / name).read_bytes()
        for left in (b"", whole[: len(whole) // 2], b"{}"):
            (tmp_path / name).write_bytes(left)
            assert load(tmp_path, of="this") is None
        (tmp_path / name).unlink()
        assert load(tmp_path, of="this") is None
        (tmp_path / name).write_bytes(whole)
    assert load(tmp_path, of="this") is not None
