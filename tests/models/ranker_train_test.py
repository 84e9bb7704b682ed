"""Training a ranker: only rows of a batch move, frozen parts do not, rounding and batch norm go with the engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import optim, state
from recjax.core.module import Functional, Params
from recjax.core.optim import Group, Optimizer
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.step import make_train_step
from recjax.data.fields import FieldShape
from recjax.losses.binary_heads import BinaryHead
from recjax.models.ranker import Head, Ranker
from recjax.nn.crossing import Cross
from recjax.nn.dense import DomainAdapters
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.tower import TowerConfig

B, ROWS = 8, 128
FIELDS = (
    FieldShape(name="user", kind="categorical", rows=30, offset=2),
    FieldShape(name="item", kind="categorical", rows=40, offset=32),
    FieldShape(name="liked", kind="sequence", width=3, rows=40, offset=32, of="item"),
    FieldShape(name="age", kind="numeric"),
)
TABLE = Optimizer(kind="adam", groups=(("^table$", Group(kind="rowwise_adagrad")),))


def ranker(**more: Any) -> Functional:
    interaction = Cross(layers=1, deep=TowerConfig(widths=(8, 4), norm="batch"))
    given = {"heads": (Head(name="click"),), "interaction": interaction, "inputs": FieldConfig(width=4)} | more
    return Functional(lambda rngs: Ranker(num_rows=ROWS, fields=FIELDS, rngs=rngs, **given))


def batch(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    liked = draw.integers(32, 72, (B, 3)).astype(np.int32)
    liked[::2, 1:] = 0
    return {
        "field/user": draw.integers(2, 32, B).astype(np.int32),
        "field/item": draw.integers(32, 72, B).astype(np.int32),
        "field/liked": liked,
        "field/age": draw.normal(size=B).astype(np.float32),
        "domain": draw.integers(0, 2, B).astype(np.int32),
        "label/click": draw.integers(0, 2, B).astype(np.float32),
        "weight": np.ones(B, np.float32),
    }


def trained(model: Functional, config: Optimizer, *, steps: int = 3, by_rows: bool = True) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    config = optim.sparing(config, model.untrained)
    optimizer, (row_wise, frozen) = optim.make(config, shapes, 100), optim.paths_of(config, shapes)
    objective = BinaryHead(name="click", head="click")
    step = make_train_step(model, (objective,), optimizer, seed=0, row_wise=row_wise if by_rows else (), frozen=frozen)
    now, step = state.create(model.init(jax.random.key(0)), optimizer), jax.jit(step)
    for number in range(steps):
        now, _ = step(now, jax.tree.map(jnp.asarray, batch(number)), {})
    return now


def close(a: Params, b: Params) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_a_step_by_rows_is_a_step_with_the_whole_table() -> None:
    model = ranker()
    some, whole = (trained(model, TABLE, by_rows=by_rows) for by_rows in (True, False))
    close(some.params, whole.params)
    touched = {i for n in range(3) for name in ("user", "item", "liked") for i in batch(n)[f"field/{name}"].ravel()}
    before = np.asarray(model.init(jax.random.key(0))["table"])
    moved = np.flatnonzero((np.asarray(some.params["table"]) != before).any(1))
    assert set(moved) == touched - {0}


def test_a_batch_that_names_more_ids_than_there_are_rows_is_no_different() -> None:
    model, rows = ranker(), 16  # 40 ids a step, and a table so short that each is taken once
    fields = tuple(FieldShape(name=f.name, kind=f.kind, width=f.width, rows=6, offset=2) for f in FIELDS[:3])
    given = {"heads": (Head(name="click"),), "interaction": Cross(layers=1), "inputs": FieldConfig(width=4)}
    model = Functional(lambda rngs: Ranker(num_rows=rows, fields=fields, rngs=rngs, **given))
    small = {
        k: np.where(x > 0, 2 + x % 6, 0).astype(np.int32)
        for k, x in batch(0).items()
        if k.startswith("field/") and x.dtype == np.int32
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer, objective = optim.make(TABLE, shapes, 100), BinaryHead(name="click", head="click")
    data = jax.tree.map(jnp.asarray, batch(0) | small)
    found = []
    for row_wise in (("table",), ()):
        step = jax.jit(make_train_step(model, (objective,), optimizer, seed=0, row_wise=row_wise))
        found.append(step(state.create(model.init(jax.random.key(0)), optimizer), data, {})[0].params)
    close(*found)


@pytest.mark.parametrize(("shape", "preset"), [("data=8", "fsdp"), ("data=4,model=2", "fsdp_model")])
def test_a_mesh_changes_nothing(shape: str, preset: str) -> None:
    # not Adam: a bias before a batch norm has no gradient but rounding, of which Adam would make whole steps
    model, plain = ranker(), dataclasses.replace(TABLE, kind="sgd")
    want = trained(model, plain).params
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    config = optim.sparing(plain, model.untrained)
    optimizer, (row_wise, frozen) = optim.make(config, shapes, 100), optim.paths_of(config, shapes)
    objective = BinaryHead(name="click", head="click")
    with mesh.activate():
        places = state.shardings(
            mesh, jax.eval_shape(lambda k: state.create(model.init(k), optimizer), jax.random.key(0)), model.axes
        )
        create = jax.jit(lambda k: state.create(model.init(k), optimizer), out_shardings=places)
        now = create(jax.random.key(0))
        step = jax.jit(
            make_train_step(model, (objective,), optimizer, seed=0, row_wise=row_wise, frozen=frozen),
            out_shardings=(places, None),
        )
        for number in range(3):
            now, _ = step(now, mesh.put_batch(batch(number)), {})
    close(jax.tree.map(np.asarray, now.params), want)


def test_what_is_frozen_stays_to_the_last_bit_and_has_no_state() -> None:
    """The second stage of MLoRA: adapters alone are trained."""
    model = ranker(
        adapters=DomainAdapters(domains=2, rank=2), interaction=Cross(layers=1, deep=TowerConfig(widths=(8, 4)))
    )
    frozen = Optimizer(kind="adamw", weight_decay=0.1, groups=((r"^(?!.*adapter_)", Group(frozen=True)),))
    now, before = trained(model, frozen), model.init(jax.random.key(0))
    after = state.by_path(now.params)
    for path, value in state.by_path(before).items():
        same = np.array_equal(np.asarray(value), np.asarray(after[path]))
        # A gets a gradient once B has moved
        assert same != ("adapter_" in path), path
    slots = [path for path in state.by_path(now.opt_state) if "weight" in path or "table" in path]
    assert not slots


def test_a_new_domain_is_trained_without_a_trace_in_the_others() -> None:
    """A slice that was kept free is taken by a domain that came later; the rest of the model is frozen."""
    model = ranker(
        adapters=DomainAdapters(domains=3, rank=2), interaction=Cross(layers=1, deep=TowerConfig(widths=(8, 4)))
    )
    config = Optimizer(kind="adam", groups=((r"^(?!.*adapter_)", Group(frozen=True)),))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer, (_, frozen) = optim.make(config, shapes, 100), optim.paths_of(config, shapes)
    objective = BinaryHead(name="click", head="click")
    step = jax.jit(make_train_step(model, (objective,), optimizer, seed=0, frozen=frozen))
    before = model.init(jax.random.key(0))
    now = state.create(before, optimizer)
    for number in range(3):
        rows = batch(number) | {"domain": np.full(B, 2, np.int32)}
        now, _ = step(now, jax.tree.map(jnp.asarray, rows), {})
    old, new = state.by_path(before), state.by_path(now.params)
    for path, value in old.items():
        slices = 2 if "adapter_" in path else len(value)
        np.testing.assert_array_equal(value[:slices], new[path][:slices], err_msg=path)
        assert "adapter_" not in path or np.any(np.asarray(value[2]) != np.asarray(new[path][2])), path
    both = [model.apply(p, jax.tree.map(jnp.asarray, batch(0)), train=False, key=None) for p in (before, now.params)]
    np.testing.assert_array_equal(both[0]["logit/click"], both[1]["logit/click"])  # its rows are of the other two


def test_running_moments_follow_the_batches_and_nothing_else_moves_them() -> None:
    model = ranker()
    norm = trained(model, TABLE, steps=1).params["interaction"]["deep"]["norm0"]
    start = model.init(jax.random.key(0))
    out = model.apply(start, jax.tree.map(jnp.asarray, batch(0)), train=True, key=jax.random.key(0))
    seen = out["seen/interaction/deep/norm0/mean"]
    np.testing.assert_allclose(norm["mean"], seen, rtol=1e-4, atol=1e-6)


def test_rounded_products_are_near() -> None:
    data = jax.tree.map(jnp.asarray, batch(0))
    exact, near = ranker(table_scale=1.0), ranker(table_scale=1.0, products="bfloat16")
    params = exact.init(jax.random.key(0))
    a, b = (model.apply(params, data, train=False, key=None)["logit/click"] for model in (exact, near))
    np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05)
    assert np.any(np.asarray(a) != np.asarray(b))
