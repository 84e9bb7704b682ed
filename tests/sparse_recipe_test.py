"""A recipe whose item table is trained row by row: on any mesh, through a checkpoint, beside a prepared sampler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from recjax.core.checkpoint import Checkpointer, Checkpoints
from recjax.core.errors import ConfigError
from recjax.core.optim import Group, Optimizer
from recjax.core.sharding import MeshConfig
from recjax.core.state import TrainState, by_path
from recjax.data.pipeline import train_batches
from recjax.losses.sampled import SampledSoftmax
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe

STEPS = 4


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    groups = (("^table$", Group(kind="rowwise_adagrad")),)
    return dataclasses.replace(
        tiny_recipe,
        objectives=[SampledSoftmax(num_negatives=32, sampler="popularity", power=0.5)],
        optimizer=Optimizer(kind="sgd", learning_rate=0.02, groups=groups),
    )


def assembly_of(recipe: Recipe, mesh: str, preset: str, devices: int) -> Assembly:
    recipe = dataclasses.replace(recipe, mesh=MeshConfig(shape=mesh, preset=preset))
    return Assembly(recipe, ensure_prepared(recipe.mixture), jax.devices()[:devices])


def go_on(assembly: Assembly, now: TrainState | None, steps: range) -> TrainState:
    recipe = assembly.recipe
    batches = train_batches(assembly.examples, recipe.mixture.rates, recipe.feed, seed=recipe.seed)
    with assembly.mesh.activate():
        now = assembly.init_state() if now is None else now
        step, const = assembly.train_step(), assembly.const()
        for number in range(steps.stop):
            batch = next(batches)
            if number in steps:
                now, _ = step(now, assembly.mesh.put_batch(batch), const)
    return now


@pytest.mark.heavy
def test_a_run_goes_on_from_its_checkpoint_on_other_devices(recipe: Recipe, tmp_path: Path) -> None:
    one = assembly_of(recipe, "data=1", "data", 1)
    want = go_on(one, None, range(STEPS))
    many = assembly_of(recipe, "data=4,model=2", "fsdp_model", 8)
    half = go_on(many, None, range(STEPS // 2))
    with Checkpointer(tmp_path, Checkpoints()) as checkpoints:
        checkpoints.save(half)
        checkpoints.wait()
        restored = checkpoints.restore(one.abstract_state())
    assert restored is not None
    slots = [path for path in restored.record.signature if "accumulator" in path]
    assert len(slots) == 1 and by_path(half)[slots[0]].shape == (one.vocab.num_rows,)
    got = go_on(one, restored.state, range(STEPS // 2, STEPS))
    close = dict(rtol=2e-4, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), jax.device_get(got), jax.device_get(want))


def test_a_full_softmax_is_refused(recipe: Recipe, tiny_recipe: Recipe) -> None:
    both = dataclasses.replace(recipe, objectives=tiny_recipe.objectives)
    with pytest.raises(ConfigError, match="moves every row of the catalogue"):
        assembly_of(both, "data=8", "data", 8).train_step()
