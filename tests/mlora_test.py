"""The recipe mlora: stages that go on with the same rows, and where adapters for each domain are worth something."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax import command
from recjax.core import optim, state
from recjax.core.flags import Flags, config_root, recipe_files
from recjax.core.module import Functional, Params
from recjax.core.optim import Group, Optimizer
from recjax.core.step import make_train_step
from recjax.data.fields import FieldShape
from recjax.data.rows_feed import RowsFeed
from recjax.losses.binary_heads import BinaryHead
from recjax.metrics.auc import auc
from recjax.models.ranker import Head, Ranker
from recjax.nn.dense import DomainAdapters
from recjax.nn.interaction import Flat
from recjax.nn.tower import TowerConfig
from recjax.recipe import Recipe
from recjax.train import train
from recjax.trained import load

TINY = config_root() / "run" / "tiny.gin"
DOMAINS, NUMBERS, HIDDEN, ROWS, HELD, STEPS = 3, 6, 16, 512, 30_000, 500
FIELDS = tuple(FieldShape(name=f"x{k}", kind="numeric") for k in range(NUMBERS))
ADAPTERS = DomainAdapters(domains=DOMAINS, rank=2)
ADAM = Optimizer(kind="adam", learning_rate=1e-2)
STAGE_2 = Optimizer(kind="adam", learning_rate=1e-2, groups=(("^(?!.*adapter_)", Group(frozen=True)),))


@pytest.mark.parametrize("system", ["mlora", "one_epoch", "ecdctr", "unicorn"])
def test_stages_that_go_on_with_the_same_rows_do_not_meet_the_same_batches(system: str) -> None:
    recipes: dict[str, Recipe] = {}
    for file in recipe_files(system):
        bindings = ("STAGES='/nowhere'",) if "%STAGES" in file.read_text() else ()
        recipes[file.stem] = command.load(Flags(gin_files=(str(file), str(TINY)), bindings=bindings))[0]
    chained = 0
    for recipe in recipes.values():
        drawn, now = [], recipe
        while now.warm_start is not None:  # of all it comes from, by way of others too
            before = recipes[now.warm_start.stage]
            drawn += [before.feed] if before.mixture == recipe.mixture else []
            now = before
        for feed in drawn:
            assert isinstance(feed, RowsFeed) and isinstance(recipe.feed, RowsFeed)
            assert feed.draw != recipe.feed.draw
            chained += 1
    assert chained >= {"mlora": 4, "one_epoch": 3, "ecdctr": 0, "unicorn": 1}[system]


@pytest.mark.heavy
def test_an_added_domain_moves_nothing_of_the_others(tmp_path: Path, prepare_here: Callable[..., None]) -> None:
    """Of a vector that two domains share nothing is trained, and a slice without rows has no gradient."""
    found = {}
    for file in recipe_files("mlora_new_domain"):
        bindings = (f"STAGES={str(tmp_path)!r}",) if "%STAGES" in file.read_text() else ()
        recipe = command.load(Flags(gin_files=(str(file), str(TINY)), bindings=bindings))[0]
        prepare_here(*recipe.mixture.tasks)
        train(recipe, tmp_path / file.stem)
        found[file.stem] = state.by_path(load(recipe, tmp_path / file.stem).params)
    before, after = found["2_mlora"], found["3_added"]
    moved = 0
    for path, old in before.items():
        new = np.asarray(after[path])
        np.testing.assert_array_equal(new[: len(old)] if "adapter_" in path else new, old, err_msg=path)
        moved += "adapter_out" in path and bool(np.any(new[len(old) :]))
    assert moved == 3  # layers whose adapter of the added domain is no longer nothing
    taken = json.loads((tmp_path / "3_added" / "manifest.json").read_text())["warm_start"]
    assert set(taken["copied"]) == set(after) and not taken["fresh"] and not taken["left"]


class World(NamedTuple):
    """Clicks by tanh(x (W + `shift` U_d V_d)) o of numbers x in domain d: `shift` is how far the weights that are best
    for a domain lie from the common ones, beside their own length."""

    weight: np.ndarray
    output: np.ndarray
    change: np.ndarray
    shift: float

    @classmethod
    def of(cls, shift: float) -> World:
        draw = np.random.default_rng(0)
        weight = draw.normal(size=(NUMBERS, HIDDEN)) / np.sqrt(NUMBERS)
        change = draw.normal(size=(DOMAINS, NUMBERS, 2)) @ draw.normal(size=(DOMAINS, 2, HIDDEN))
        change *= np.linalg.norm(weight) / np.linalg.norm(change, axis=(1, 2), keepdims=True)
        return cls(weight, draw.normal(size=HIDDEN), change, shift)

    def rows(self, count: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """A batch, and the chance of every click. Domain d has half as many rows as d - 1."""
        draw = np.random.default_rng(seed)
        size = 0.5 ** np.arange(DOMAINS)
        domain = draw.choice(DOMAINS, count, p=size / size.sum()).astype(np.int32)
        x = draw.normal(size=(count, NUMBERS))
        own = (self.weight[None] + self.shift * self.change)[domain]
        chance = 1 / (1 + np.exp(-np.tanh(np.einsum("bi,bio->bo", x, own)) @ self.output))
        batch = {f"field/{f.name}": x[:, k].astype(np.float32) for k, f in enumerate(FIELDS)}
        label = (draw.random(count) < chance).astype(np.float32)
        return batch | {"domain": domain, "label/click": label, "weight": np.ones(count, np.float32)}, chance


def ranker(adapters: DomainAdapters | None) -> Functional:
    deep = TowerConfig(widths=(HIDDEN,), activation="tanh")
    given: dict[str, Any] = {"heads": (Head(name="click"),), "interaction": Flat(deep=deep), "adapters": adapters}
    return Functional(lambda rngs: Ranker(num_rows=128, fields=FIELDS, rngs=rngs, **given))


SHARED, MLORA = ranker(None), ranker(ADAPTERS)


@functools.cache
def stage(adapted: bool) -> Any:
    """A function that trains a stage: (parameters, its batches) -> parameters."""
    model, config = (MLORA, STAGE_2) if adapted else (SHARED, ADAM)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer, (_, frozen) = optim.make(config, shapes, STEPS), optim.paths_of(config, shapes)
    step = make_train_step(model, (BinaryHead(name="click", head="click"),), optimizer, seed=0, frozen=frozen)

    def run(params: Params, batches: dict[str, jax.Array]) -> Params:
        begin = state.create(params, optimizer)
        return jax.lax.scan(lambda now, batch: (step(now, batch, {})[0], None), begin, batches)[0].params

    return jax.jit(run)


def stages(shift: float) -> dict[str, float]:
    """AUC in each domain, weighted with its rows, of the chances, of the shared model and of adapters on it. The shared
    model is trained for as many steps as both stages together."""
    world = World.of(shift)
    first, second = (
        {name: jnp.asarray(x.reshape(STEPS, ROWS)) for name, x in world.rows(STEPS * ROWS, seed)[0].items()}
        for seed in (1, 2)
    )
    backbone = stage(False)(SHARED.init(jax.random.key(0)), first)
    fresh = MLORA.init(jax.random.key(1))
    begin = state.by_path(fresh) | {path: jnp.copy(x) for path, x in state.by_path(backbone).items()}
    trained = {"shared": stage(False)(backbone, second), "mlora": stage(True)(state.from_paths(fresh, begin), second)}
    held, chance = world.rows(HELD, 3)
    batch = {name: jnp.asarray(x) for name, x in held.items()}
    said = {
        name: np.asarray(model.apply(trained[name], batch, train=False, key=None)["logit/click"])
        for name, model in (("shared", SHARED), ("mlora", MLORA))
    }
    positive, domain = held["label/click"] > 0.5, held["domain"]
    size = np.bincount(domain) / len(domain)
    return {
        name: float(sum(n * auc(z[domain == d], positive[domain == d]) for d, n in enumerate(size)))
        for name, z in {**said, "best": chance}.items()
    }


@pytest.mark.heavy
def test_adapters_are_worth_what_domains_differ_by_and_nothing_where_they_do_not() -> None:
    found = {shift: stages(shift) for shift in (0.0, 0.3, 0.6, 1.0)}
    gain = {shift: by["mlora"] - by["shared"] for shift, by in found.items()}
    assert abs(gain[0.0]) < 0.002  # alike domains: neither better, nor is anything lost
    assert gain[0.0] + 0.002 < gain[0.3] < gain[0.6] < gain[1.0]
    for shift in (0.6, 1.0):  # most of what one model for all cannot know
        assert gain[shift] > 0.7 * (found[shift]["best"] - found[shift]["shared"])
