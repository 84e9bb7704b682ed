"""Hard tasks, sampled candidates and recent popularity on prepared examples, through a recipe."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from recjax.data.examples import Examples
from recjax.evaluation import assess
from recjax.protocol import DEFAULT_BASELINES, HARD
from recjax.recipe import Assembly
from recjax.tasks.cache import place_of
from recjax.tasks.mixtures import Mixture


@pytest.mark.parametrize(
    "split",
    [
        "leave_last",
        pytest.param("leave_one_out", marks=pytest.mark.heavy),
        pytest.param("global_time", marks=pytest.mark.heavy),
    ],
)
def test_every_task_runs_on_every_split(split, tiny_recipe, prepare_here):
    [task] = tiny_recipe.mixture.tasks
    task = dataclasses.replace(task, split=split)
    prepare_here(task)
    hard = tuple(name for name in HARD if name != "domains")
    evaluation = dataclasses.replace(
        tiny_recipe.evaluation,
        hard=hard,
        recent=4,
        candidates=20,
        baselines=("popularity", "recent_popularity"),
    )
    recipe = dataclasses.replace(tiny_recipe, mixture=Mixture(tasks=[task]), evaluation=evaluation)
    assembly = Assembly(recipe, [Examples.open(place_of(task).path)])
    evaluator = assembly.evaluator("test")
    metrics = assess(evaluator, assembly.model.init(jax.random.key(0)), {}).metrics()
    found = metrics["hard"]
    assert tuple(found) == hard
    assert all(task["groups"] for task in found.values())
    assert set(found["robustness"]["groups"]["30% deleted"]["rows"]) == {"model", "popularity", "recent_popularity"}
    steps = [name for name in found["trajectory"]["groups"] if "true events" in name]
    assert len(steps) == {"leave_one_out": 1, "leave_last": 10, "global_time": 10}[split]
    assert ("only one step" in found["trajectory"]["about"]) == (split == "leave_one_out")
    assert not metrics["protocol"]["target_time_used"] and metrics["protocol"]["times_used"] == "none"
    assert metrics["rows"]["popularity"]["sampled_recall@10"] >= metrics["rows"]["popularity"]["recall@10"]
    assert 0 < metrics["rows"]["recent_popularity"]["recall@10"] < 1
    assert "recent_popularity" not in DEFAULT_BASELINES
