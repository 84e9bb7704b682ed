"""Adapters: they begin as nothing, are all that moves, merge into the base, and lie on any mesh as on one device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import blockwise, optim
from recjax.core.adapters import ADAPTERS, Adapted, Adapters
from recjax.core.checkpoint import Checkpointer
from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Params
from recjax.core.sharding import MeshConfig
from recjax.core.state import by_path
from recjax.core.warm_start import WarmStart
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.train import CHECKPOINTS
from recjax.trained import load

MODEL = TransformerConfig(
    num_layers=2, width=16, num_heads=4, num_kv_heads=2, position="rotary", norm="rms", ffn="swiglu", bias=False
)


def base(**changed: Any) -> Functional:
    encoder = dataclasses.replace(MODEL, **changed)
    return Functional(lambda rngs: Sequence(num_rows=128, encoder=encoder, max_length=8, rngs=rngs))


def batch() -> dict[str, jax.Array]:
    ids = jax.random.randint(jax.random.key(3), (2, 8), 2, 100)
    places = jnp.broadcast_to(jnp.arange(8), (2, 8))
    return {"history_ids": ids, "positions": places, "segment_ids": jnp.ones((2, 8), jnp.int32)}


def moved(params: Params) -> Params:
    """As after some training: no adapter is zero any more."""
    adapters = by_path(params[ADAPTERS])
    keys = jax.random.split(jax.random.key(1), len(adapters))
    drawn = [0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, adapters.values(), strict=True)]
    return {**params, ADAPTERS: jax.tree.unflatten(jax.tree.structure(params[ADAPTERS]), drawn)}


def fresh(model: Functional) -> Params:
    return jax.jit(model.init)(jax.random.key(0))


def hidden(model: Functional, params: Params) -> np.ndarray:
    run = jax.jit(lambda params, batch: model.apply(params, batch, train=False, key=None)["hidden"])
    return np.asarray(run(params, batch()))


def test_fresh_adapters_change_nothing() -> None:
    plain, model = base(), Adapted(base(), Adapters())
    params, adapted = fresh(plain), fresh(model)
    for path, x in by_path(params).items():
        np.testing.assert_array_equal(by_path(adapted)[path], x)
    np.testing.assert_array_equal(hidden(model, adapted), hidden(plain, params))


@pytest.mark.parametrize("quantised, unroll", [("", True), ("int8", False), ("nf4", False)])
def test_merged_is_unmerged(quantised: str, unroll: bool) -> None:
    paths = (r"attention/", r"ffn/", r"^table$")
    model = Adapted(base(unroll=unroll), Adapters(paths=paths, rank=2, quantised=quantised))
    params = moved(fresh(model))
    merged = jax.jit(model.merge)(params)
    assert jax.tree.structure(merged) == jax.tree.structure(model.base.axes, is_leaf=lambda x: isinstance(x, tuple))
    np.testing.assert_allclose(hidden(model, params), hidden(model.base, merged), atol=1e-6)
    assert np.abs(hidden(model, params) - hidden(model.base, jax.jit(model.plain)(params))).max() > 0.1


def test_a_weight_is_the_base_and_a_product() -> None:
    model = Adapted(base(), Adapters(rank=3, alpha=6.0))
    params = moved(fresh(model))
    here, there = by_path(params), by_path(jax.jit(model.merge)(params))
    found = [path for path in there if f"{ADAPTERS}/{path}/a" in here]
    assert {path.rsplit("/", 1)[-1] for path in found} >= {"query", "key", "value", "out", "gate", "inner", "outer"}
    for path in found:
        w, a, b = (np.asarray(here[p]) for p in (path, f"{ADAPTERS}/{path}/a", f"{ADAPTERS}/{path}/b"))
        for layer in range(2):
            product = a[layer].reshape(-1, 3) @ b[layer].reshape(3, -1)
            np.testing.assert_allclose(there[path][layer], w[layer] + 2 * product.reshape(w[layer].shape), atol=1e-5)


def test_every_weight_has_the_rank_it_was_given() -> None:
    model = Adapted(base(), Adapters(ranks=((r"ffn/outer", 0), (r"attention/", 5)), rank=2, quantised="int8"))
    ranks = {
        p: x.shape[-1] for p, x in by_path(jax.eval_shape(model.init, jax.random.key(0))).items() if p.endswith("/a")
    }
    assert {rank for path, rank in ranks.items() if "attention" in path} == {5}
    assert {rank for path, rank in ranks.items() if "ffn" in path} == {2}
    assert not any("outer" in path for path in ranks)
    assert any("ffn/outer/values" in path for path in model.held)  # stored all the same


@pytest.mark.parametrize(
    "config, where",
    [
        ({"paths": (r"no_such",)}, "Adapters.paths"),
        ({"paths": (r"norm",)}, "Adapters.paths"),  # no matrix
        ({"ranks": ((r"table", 2),)}, "Adapters.ranks"),
        ({"trained": (r"ffn/",)}, "Adapters.trained"),
    ],
)
def test_patterns_that_find_nothing(config: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Adapted(base(), Adapters(**config))
    assert where in caught.value.message


@pytest.mark.parametrize(
    "config", [{"rank": 0}, {"quantised": "int4"}, {"paths": ("(",)}, {"alpha": 0.0}, {"block": 0}]
)
def test_settings_that_cannot_be(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Adapters(**config)


def recipe_of(tiny: Any, **changed: Any) -> Recipe:
    encoder = dataclasses.replace(tiny.model.keywords["encoder"], num_layers=1, dropout=0.0)
    optimizer = optim.Optimizer(learning_rate=0.05, weight_decay=0.1, clip_norm=1.0)
    told = {"model": tiny.model.with_(encoder, 0.0), "optimizer": optimizer, "adapters": Adapters(rank=2)}
    return dataclasses.replace(tiny, **{**told, **changed})


def stepped(recipe: Recipe, devices: Any = None) -> tuple[Any, Any, list[float]]:
    """The state before and after two steps, and the losses."""
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture), devices)
    state, batches, const, losses = assembly.init_state(), assembly.batches(), assembly.const(), []
    first, step = jax.device_get(state), assembly.train_step()
    with assembly.mesh.activate():
        for _ in range(2):
            state, metrics = step(state, assembly.mesh.put_batch(next(batches)), const)
            losses.append(float(metrics["loss"]))
    return first, jax.device_get(state), losses


@pytest.mark.parametrize("quantised", ["", "nf4"])
def test_only_adapters_move_and_only_they_have_a_state(tiny_recipe: Any, quantised: str) -> None:
    adapters = Adapters(rank=2, quantised=quantised, trained=(r"final_norm/",))
    optimizer = optim.Optimizer(learning_rate=0.05, weight_decay=0.1, ema_decay=0.5)
    before, after, losses = stepped(recipe_of(tiny_recipe, adapters=adapters, optimizer=optimizer), jax.devices()[:1])
    old, new = by_path(before.params), by_path(after.params)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {path for path in old if path.startswith(f"{ADAPTERS}/") or "final_norm/" in path}
    slots = [path for path, x in by_path(after.opt_state).items() if x.ndim]
    assert slots and all(ADAPTERS in path or "final_norm/" in path for path in slots)
    assert losses[1] < losses[0]
    # the average is of what moves, beside the base as it is
    averaged = by_path(optim.eval_params(after))
    assert averaged.keys() == new.keys()
    assert all(np.array_equal(averaged[path], new[path]) == (path not in changed) for path in new)


def test_a_mesh_changes_nothing(tiny_recipe: Any) -> None:
    adapters = Adapters(rank=2, quantised="int8", block=4)
    one = recipe_of(tiny_recipe, adapters=adapters)
    split = dataclasses.replace(one, mesh=MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    _, after, losses = stepped(one, jax.devices()[:1])
    _, sharded, found = stepped(split)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for path, x in by_path(after.params).items():
        np.testing.assert_allclose(by_path(sharded.params)[path], x, atol=2e-4, err_msg=path)


def test_adapters_lie_as_their_base_does(tiny_recipe: Any) -> None:
    recipe = recipe_of(tiny_recipe, mesh=MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture))
    specs = {path: tuple(x.sharding.spec) for path, x in by_path(assembly.abstract_state().params).items()}
    inner = next(path for path in specs if path.startswith("encoder") and path.endswith("ffn/inner"))
    layers, ins, outs = specs[inner]
    assert (ins, outs) == ("data", "model")
    assert specs[f"{ADAPTERS}/{inner}/a"][:2] == (layers, ins) and specs[f"{ADAPTERS}/{inner}/b"][-1] == outs


def test_from_a_plain_checkpoint_to_a_merged_model(tiny_recipe: Any, tmp_path: Path) -> None:
    """Started from a run without adapters, saved, resumed, taken up by another run, merged when loaded."""
    recipe = recipe_of(tiny_recipe, adapters=Adapters(rank=2, quantised="int8", block=4))
    examples, one = ensure_prepared(recipe.mixture), jax.devices()[:1]
    plain = Assembly(dataclasses.replace(recipe, adapters=None, seed=1), examples, one)
    assembly = Assembly(recipe, examples, one)
    names = {"recipe": recipe.name, "vocabulary": assembly.vocabulary_hash}

    def checkpoints(folder: str) -> Checkpointer:
        return Checkpointer(tmp_path / folder / CHECKPOINTS, recipe.checkpoints, **names)

    base = plain.init_state()
    with checkpoints("plain") as saved:
        saved.save(base)
    fresh = assembly.init_state()
    start, _ = assembly.warm_started(fresh, WarmStart(checkpoints=str(tmp_path / "plain" / CHECKPOINTS)))
    there, here = by_path(base.params), by_path(start.params)
    for path, x in there.items():
        stored = blockwise.store(x, "int8", 4) if path not in here else {"": x}
        for part, expected in stored.items():
            np.testing.assert_array_equal(here[f"{path}/{part}".rstrip("/")], expected)

    batch, step, const = assembly.mesh.put_batch(next(assembly.batches())), assembly.train_step(), assembly.const()
    with assembly.mesh.activate(), checkpoints("adapted") as saved:
        state, _ = step(start, batch, const)
        saved.save(state)
        saved.wait()
        resumed = saved.restore(assembly.abstract_state())
        assert resumed is not None
        first = jax.device_get(state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), first)
        after, again = (jax.device_get(step(s, batch, const)[0]) for s in (state, resumed.state))
    jax.tree.map(np.testing.assert_array_equal, again, after)

    folder = str(tmp_path / "adapted" / CHECKPOINTS)
    taken, _ = assembly.warm_started(assembly.init_state(), WarmStart(checkpoints=folder))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(taken.params), first.params)
    merged = load(recipe, tmp_path / "adapted")
    assert type(merged.assembly.model) is Functional and merged.assembly.recipe.adapters is None
    assert isinstance(assembly.model, Adapted)
    expected = jax.jit(assembly.model.merge)(first.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), dict(merged.params), expected)
