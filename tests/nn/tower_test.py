"""Towers against numpy: batch norm and its running moments, Dice, residual blocks, dropout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional, Module, Params, Rngs
from recjax.nn.dense import DomainAdapters, Pass, adapt
from recjax.nn.tower import Deep, TowerConfig, moved, name_norms

B, INPUTS = 16, 3


class Model(Module):
    def __init__(self, config: Deep, *, adapted: bool = False, rngs: Rngs) -> None:
        self.tower = config.make(INPUTS, rngs=rngs)
        if adapted:
            adapt(self, DomainAdapters(domains=2), rngs)
        name_norms(self)

    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        call = Pass(train, jax.random.key(0), batch.get("domain"), {})
        y = self.tower(batch["x"], call)
        return {"y": y, **call.seen}

    def maintain(self, seen: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        return moved(self, seen)


def built(config: Deep, **more: bool) -> tuple[Functional, Params, dict[str, jax.Array]]:
    model, draw = Functional(lambda rngs: Model(config, rngs=rngs, **more)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(np.abs(draw.normal(size=s.shape)) + 0.1), shapes)
    return model, params, {"x": jnp.float32(3 * draw.normal(size=(B, INPUTS)) + 1)}


def long_trained(params: Params) -> Params:
    """The same after 100 batches, when running moments move by their momentum."""
    return {"tower": params["tower"] | {"norm0": params["tower"]["norm0"] | {"batches": jnp.float32(100)}}}


def exact(params: Params) -> Params:
    return jax.tree.map(np.float64, params)


def test_batch_norm_goes_by_its_batch_in_training_and_by_running_moments_else() -> None:
    model, params, batch = built(TowerConfig(widths=(4,), norm="batch", activation="none"))
    p = exact(params)["tower"]
    x = np.float64(batch["x"]) @ p["layer0"]["weight"] + p["layer0"]["bias"]
    norm = p["norm0"]
    for train in (True, False):
        mean, variance = (x.mean(0), x.var(0)) if train else (norm["mean"], norm["variance"])
        want = (x - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
        np.testing.assert_allclose(model.apply(params, batch, train=train)["y"], want, rtol=1e-4, atol=1e-4)
    out = model.apply(params, batch, train=True)
    seen = {name: out[name][None] for name in ("tower/norm0/mean", "tower/norm0/variance")}
    after = model.maintain(long_trained(params), seen, jax.random.key(0))["tower"]["norm0"]
    np.testing.assert_allclose(after["mean"], 0.9 * norm["mean"] + 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(after["variance"], 0.9 * norm["variance"] + 0.1 * x.var(0, ddof=1), rtol=1e-4)
    assert after["batches"] == 101
    assert set(model.untrained) == {f"tower/norm0/{name}" for name in ("mean", "variance", "batches")}


@pytest.mark.parametrize(
    ("config", "norm"), [({"norm": "batch"}, ("norm0",)), ({"activation": "dice"}, ("dice0", "norm"))]
)
def test_a_model_of_a_few_steps_is_evaluated_as_it_was_trained(config: dict[str, str], norm: tuple[str, ...]) -> None:
    """Small activations: running moments are means of what was seen, without a trace of the variance of 1 at first."""
    model, _, _ = built(TowerConfig(widths=(4,), **config))
    params, draw = model.init(jax.random.key(1)), np.random.default_rng(1)
    seen = []
    for _ in range(8):
        batch = {"x": jnp.float32(1e-2 * draw.normal(size=(256, INPUTS)) + 1e-2)}
        out = model.apply(params, batch, train=True)
        seen.append({name: value for name, value in out.items() if name != "y"})
        params = model.maintain(params, {k: v[None] for k, v in seen[-1].items()}, jax.random.key(0))
    after = functools.reduce(lambda tree, name: tree[name], ("tower", *norm), params)
    for name in ("mean", "variance"):
        path = "/".join(("tower", *norm, name))
        np.testing.assert_allclose(after[name], np.mean([s[path] for s in seen], axis=0), rtol=1e-5, atol=1e-9)
    told, trained = (model.apply(params, batch, train=train)["y"] for train in (False, True))
    np.testing.assert_allclose(told, trained, atol=0.3 * np.asarray(trained).std())


def test_moments_of_micro_batches_are_averaged() -> None:
    model, params, _ = built(TowerConfig(widths=(2,), norm="batch"))
    seen = {f"tower/norm0/{name}": jnp.float32([[1, 2], [3, 6]]) for name in ("mean", "variance")}
    params = long_trained(params)
    after = model.maintain(params, seen, jax.random.key(0))["tower"]["norm0"]["mean"]
    before = np.asarray(params["tower"]["norm0"]["mean"])
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * np.asarray([2, 4]), rtol=1e-5)
    np.testing.assert_array_equal(
        model.maintain(params, {}, jax.random.key(0))["tower"]["norm0"]["mean"], before
    )  # nothing seen, nothing moved


def test_dice_is_its_formula() -> None:
    model, params, batch = built(TowerConfig(widths=(4,), activation="dice"))
    p = exact(params)["tower"]
    x = np.float64(batch["x"]) @ p["layer0"]["weight"] + p["layer0"]["bias"]
    share = 1 / (1 + np.exp(-(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-9)))
    want = share * x + (1 - share) * p["dice0"]["alpha"] * x
    np.testing.assert_allclose(model.apply(params, batch, train=True)["y"], want, rtol=1e-4, atol=1e-5)


def test_layer_norm_stands_before_the_activation() -> None:
    model, params, batch = built(TowerConfig(widths=(4,), norm="layer"))
    p = exact(params)["tower"]
    x = np.float64(batch["x"]) @ p["layer0"]["weight"] + p["layer0"]["bias"]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    want = np.maximum(x * p["norm0"]["scale"] + p["norm0"]["bias"], 0)
    np.testing.assert_allclose(model.apply(params, batch)["y"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_dropout_is_of_training_and_spares_adapters(adapted: bool) -> None:
    model, params, batch = built(TowerConfig(widths=(64,), dropout=0.5, activation="none"), adapted=adapted)
    batch = batch | ({"domain": jnp.zeros(B, jnp.int32)} if adapted else {})
    kept, whole = (np.asarray(model.apply(params, batch, train=train)["y"]) for train in (True, False))
    layer = exact(params)["tower"]["layer0"]
    backbone = np.float64(batch["x"]) @ layer["weight"] + layer["bias"]
    rest = whole - backbone  # of the adapter, which is never dropped
    dropped = np.isclose(kept, rest, rtol=1e-3, atol=1e-3)
    assert 0.4 < dropped.mean() < 0.6
    np.testing.assert_allclose(kept, np.where(dropped, rest, rest + 2 * backbone), rtol=1e-3, atol=1e-3)
    assert bool(np.abs(rest).max() > 0.1) == adapted
