"""Parameters that a model sets itself: fitted before the first step, maintained after each, left alone otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from recjax.core import optim, state
from recjax.core.module import Functional, Module, Rngs, param
from recjax.core.optim import Optimizer
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.step import make_train_step
from recjax.losses.objective import LossSum, Objective

WIDTH, DECAY = 3, 0.75
ONES = {"item/vectors": jnp.full((5, WIDTH), 2.0)}


class RunningMean(Module):
    """weight * (x - mean), where `mean` follows the mean of the batches, in a module inside a module."""

    class Statistics(Module):
        def __init__(self, *, rngs: Rngs) -> None:
            zeros = nnx.initializers.zeros
            self.mean = param(rngs, (WIDTH,), (None,), zeros, trained=False)
            self.steps = param(rngs, (), (), zeros, trained=False)

    def __init__(self, *, rngs: Rngs) -> None:
        self.weight = param(rngs, (WIDTH,), (None,), nnx.initializers.ones)
        self.statistics = RunningMean.Statistics(rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Any) -> dict[str, jax.Array]:
        x = batch["x"]
        y = self.weight[...][None] * (x - self.statistics.mean[...][None])
        return {"y": y, "seen/sum": x.sum(0), "seen/count": jnp.float32(x.shape[0])}

    def fit(self, facts: dict[str, jax.Array], key: Any) -> dict[str, jax.Array]:
        return {"statistics/mean": facts["item/vectors"].mean(0)}

    def maintain(self, seen: dict[str, jax.Array], key: Any) -> dict[str, jax.Array]:
        statistics = self.statistics
        mean = seen["sum"].sum(0) / seen["count"].sum()
        return {
            "statistics/mean": DECAY * statistics.mean[...] + (1 - DECAY) * mean,
            "statistics/steps": statistics.steps[...] + 1,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares(Objective):
    def __call__(self, out: Any, batch: Any, const: Any, key: Any) -> LossSum:
        return LossSum((out["y"] ** 2).sum(), batch["weight"].sum(), {})


MODEL = Functional(lambda rngs: RunningMean(rngs=rngs))
CONFIG = optim.sparing(Optimizer(kind="adamw", learning_rate=0.1, weight_decay=0.5, no_decay=()), MODEL.untrained)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(1, 1, (8, WIDTH)).astype(np.float32), "weight": np.ones(8, np.float32)} for _ in range(count)
    ]


def trained(count: int, *, accumulate: int = 1, begin: state.TrainState | None = None, devices: int = 1) -> Any:
    params = MODEL.fit(MODEL.init(jax.random.key(0)), ONES, jax.random.key(1))
    transform = optim.make(CONFIG, params, 10)
    step = jax.jit(make_train_step(MODEL, [Squares()], transform, seed=0, accumulate=accumulate))
    now = begin or state.create(params, transform)
    mesh = make_mesh(MeshConfig(shape=f"data={devices}"), jax.devices()[:devices])
    with mesh.activate():
        for batch in batches(count)[int(now.step) :]:
            now, _ = step(now, mesh.put_batch(batch), {})
    return now


def test_it_follows_its_rule_and_nothing_else_moves_it() -> None:
    """Neither the decay of weights nor the moments of the optimiser."""
    assert MODEL.untrained == ("statistics/mean", "statistics/steps") and MODEL.maintains
    mean = np.full(WIDTH, 2.0)  # as fitted
    for batch in batches(5):
        mean = DECAY * mean + (1 - DECAY) * batch["x"].mean(0)
    now = trained(5)
    np.testing.assert_allclose(now.params["statistics"]["mean"], mean, rtol=1e-6)
    assert now.params["statistics"]["steps"] == 5
    assert not any("statistics" in path for path in state.by_path(now.opt_state))


def test_the_step_uses_what_stood_before_it() -> None:
    """The trained parameter moves as if the mean were a constant of each step."""
    weight, mean, chain = jnp.ones(WIDTH), jnp.full(WIDTH, 2.0), optax.adamw(0.1, weight_decay=0.5)
    opt = chain.init(weight)
    for batch in batches(3):
        gradient = jax.grad(lambda w, x=batch["x"], m=mean: ((w[None] * (x - m[None])) ** 2).sum() / 8)(weight)
        updates, opt = chain.update(gradient, opt, weight)
        weight = optax.apply_updates(weight, updates)
        mean = DECAY * mean + (1 - DECAY) * batch["x"].mean(0)
    np.testing.assert_allclose(trained(3).params["weight"], weight, rtol=1e-5)


@pytest.mark.parametrize("how", [{"accumulate": 4}, {"devices": 8}, {"accumulate": 2, "devices": 4}])
def test_micro_batches_and_devices_change_nothing(how: dict[str, int]) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), trained(4, **how).params, trained(4).params)


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    resumed = trained(6, begin=trained(2))
    jax.tree.map(np.testing.assert_array_equal, resumed, trained(6))


def test_a_value_of_another_shape_is_refused() -> None:
    params = MODEL.init(jax.random.key(0))
    with pytest.raises(ValueError, match="statistics/mean|mean"):
        MODEL.fit(params, {"item/vectors": jnp.ones((5, WIDTH + 1))}, jax.random.key(0))


def test_a_model_without_the_methods_is_left_as_it_is() -> None:
    class Plain(Module):
        def __init__(self, *, rngs: Rngs) -> None:
            self.weight = param(rngs, (2,), (None,), nnx.initializers.ones)

    plain = Functional(lambda rngs: Plain(rngs=rngs))
    params = plain.init(jax.random.key(0))
    assert plain.untrained == () and not plain.maintains and plain.fit(params, ONES, jax.random.key(0)) is params
    assert optim.sparing(CONFIG, ()) is CONFIG
