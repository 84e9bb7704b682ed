"""Training row by row: the numbers of a dense step, on any mesh, at a cost that does not know the catalogue."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recjax.core import optim, state
from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Rngs, param
from recjax.core.optim import Group, Optimizer
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.step import make_train_step
from recjax.losses.sampled import SampledSoftmax
from recjax.losses.softmax import CatalogueSoftmax
from recjax.nn.embed import lookup_and_pass
from recjax.nn.norm import unit

B, L, V, ITEMS, D = 8, 6, 512, 480, 8
STEPS = 4
TABLES = r"(^|/)(table|head)$"


def optimizer_of(kind: str, **more) -> Optimizer:
    # Gradient descent for the rest: Adam would make steps out of gradients that are zero up to rounding.
    return Optimizer(kind="sgd", learning_rate=0.01, groups=((TABLES, Group(kind=kind)),), **more)


class Tiny(Module):
    """The last item turned by a matrix; compiles in no time."""

    def __init__(self, *, num_rows: int, tied: bool, normalize: bool, rngs: Rngs) -> None:
        normal = nnx.initializers.normal(0.5)
        self.normalize = normalize
        self.table = param(rngs, (num_rows, D), ("items", None), normal)
        self.head = None if tied else param(rngs, (num_rows, D), ("items", None), normal)
        self.turn = param(rngs, (D, D), (None, None), normal)

    def __call__(self, batch, *, train, key):
        x, table = lookup_and_pass(self.table[...], batch["history_ids"])
        table = table if self.head is None else self.head[...]
        if "item/age" in batch:
            table = table * batch["item/age"][:, None]
        return {"hidden": x @ self.turn[...], "table": unit(table) if self.normalize else table}


def model_of(rows: int = V, *, tied: bool = True, normalize: bool = False) -> Functional:
    return Functional(functools.partial(Tiny, num_rows=rows, tied=tied, normalize=normalize))


def batches(rows: int = ITEMS, count: int = STEPS) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        length = draw.integers(1, L + 1, B)
        real = np.arange(L) < length[:, None]
        ids = np.where(real, draw.integers(2, 2 + rows, (B, L)), 0).astype(np.int32)
        targets = np.where(real, draw.integers(2, 2 + rows, (B, L)), 0).astype(np.int32)
        found.append({"history_ids": ids, "target_ids": targets, "weight": real.astype(np.float32)})
    return found


def const_of(rows: int = V, items: int = ITEMS) -> dict[str, jax.Array]:
    valid = (np.arange(rows) >= 2) & (np.arange(rows) < 2 + items)
    return {"item_valid": jnp.asarray(valid), "item_count": jnp.asarray(valid * 3.0), "num_items": jnp.int32(items)}


def jitted(config: Optimizer, *, by_rows: bool, objective=None, model=None, accumulate: int = 1):
    model = model or model_of()
    objectives = (objective or SampledSoftmax(num_negatives=16),)
    params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optim.make(config, params, 100)
    row_wise, frozen = optim.paths_of(config, params) if by_rows else ((), ())
    step = make_train_step(
        model, objectives, optimizer, seed=3, accumulate=accumulate, row_wise=row_wise, frozen=frozen
    )
    return jax.jit(step), lambda: state.create(model.init(jax.random.key(1)), optimizer)


def run(step, begin, const, data):
    metrics = []
    for batch in data:
        begin, found = step(begin, batch, const)
        metrics.append(found)
    return begin, metrics


def close(a, b, tolerance: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), a, b)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("rowwise_adagrad", "untied and clipped"),
        ("rowwise_adam", "cosine and popular"),
        ("rowwise_adagrad", "micro-batches"),
    ],
)
def test_equals_the_dense_step_and_leaves_other_rows_alone(kind: str, case: str) -> None:
    model = model_of(tied="untied" not in case, normalize="cosine" in case)
    config = optimizer_of(kind, clip_norm=0.05 if "clipped" in case else None)
    objective = SampledSoftmax(num_negatives=16, sampler="popularity") if "popular" in case else None
    accumulate = 2 if case == "micro-batches" else 1
    const = const_of()
    got, want = (
        run(step, create(), const, batches())
        for step, create in (
            jitted(config, by_rows=by_rows, objective=objective, model=model, accumulate=accumulate)
            for by_rows in (True, False)
        )
    )
    close(got, want)
    before = model.init(jax.random.key(1))
    moved = np.asarray((got[0].params["table"] != before["table"]).any(1))
    np.testing.assert_array_equal(moved, np.asarray((want[0].params["table"] != before["table"]).any(1)))
    assert 0 < moved.sum() < V / 2 and not moved[:2].any()


@pytest.mark.parametrize(("shape", "preset"), [("data=8", "data"), ("data=4,model=2", "fsdp_model")])
def test_many_devices_equal_one_and_no_table_is_gathered(shape: str, preset: str) -> None:
    config, model = optimizer_of("rowwise_adagrad"), model_of()
    step, create = jitted(config, by_rows=True, model=model)
    want = run(step, create(), const_of(), batches())
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        places = state.shardings(mesh, jax.eval_shape(create), model.axes)
        step, create = jitted(config, by_rows=True, model=model)
        begin = jax.jit(create, out_shardings=places)()
        const = {k: jax.device_put(v, mesh.sharding(("items",) if v.ndim else ())) for k, v in const_of().items()}
        data = [mesh.put_batch(batch) for batch in batches()]
        compiled = step.lower(begin, data[0], const).compile()
        got = run(jax.jit(step, out_shardings=(places, None)), begin, const, data)
    close(got, want)
    text = compiled.as_text()
    assert not re.findall(rf"= \w+\[{V}(?:,\d+)?\]\S* (?:all-gather|all-reduce|all-to-all)\(", text)


def test_a_run_cut_in_two_is_the_run() -> None:
    step, create = jitted(optimizer_of("rowwise_adam"), by_rows=True)
    whole, _ = run(step, create(), const_of(), batches())
    half, _ = run(step, create(), const_of(), batches()[:2])
    half = jax.tree.map(jnp.asarray, jax.device_get(half))
    rest, _ = run(step, half, const_of(), batches()[2:])
    jax.tree.map(np.testing.assert_array_equal, rest, whole)


def test_state_is_one_number_a_row() -> None:
    _, create = jitted(optimizer_of("rowwise_adagrad"), by_rows=True)
    slots = {path: leaf.shape for path, leaf in state.by_path(create().opt_state).items() if path.endswith("table")}
    assert list(slots.values()) == [(V,)] and all("accumulator" in path for path in slots)


def test_memory_of_a_step_does_not_grow_with_the_catalogue() -> None:
    """With the state donated, nothing the step allocates has the length of the table."""
    temporary = []
    for rows in (2**12, 2**18):
        step, create = jitted(optimizer_of("rowwise_adagrad"), by_rows=True, model=model_of(rows))
        const = jax.eval_shape(lambda rows=rows: const_of(rows, rows - 10))
        lowered = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(create), batches()[0], const)
        memory = lowered.compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        assert memory.alias_size_in_bytes > rows * 8 * 4
    assert temporary[1] <= temporary[0] + 4096


def test_facts_follow_their_rows() -> None:
    """A model that reads a fact of each item sees it beside the right row."""
    const = {**const_of(), "item/age": jnp.linspace(0.5, 2, V)}
    got, want = (
        run(step, create(), const, batches())
        for step, create in (jitted(optimizer_of("rowwise_adagrad"), by_rows=by_rows) for by_rows in (True, False))
    )
    close(got, want)


class ByFacts(Module):
    """Items by a product with what is known of them; nothing is kept for any one."""

    by_item = True

    def __init__(self, *, rngs: Rngs) -> None:
        self.turn = param(rngs, (D, D), (None, None), nnx.initializers.normal(0.5))

    def __call__(self, batch, *, train, key):
        x, table = lookup_and_pass(batch["item/vectors"] @ self.turn[...], batch["history_ids"])
        return {"hidden": x, "table": table}


def knowing(rows: int = V, items: int = ITEMS) -> dict[str, jax.Array]:
    return {**const_of(rows, items), "item/vectors": jax.random.normal(jax.random.key(5), (rows, D))}


@pytest.mark.parametrize(("items", "accumulate"), [(ITEMS, 1), (ITEMS, 2), (40, 1)])
def test_a_model_of_facts_sees_the_items_of_its_batch_and_learns_the_same(items: int, accumulate: int) -> None:
    found, flops = [], []
    const, data = knowing(items + 32, items), batches(items)
    for by_item in (True, False):
        model = Functional(ByFacts)
        model.by_item = by_item
        config = Optimizer(kind="sgd", learning_rate=0.1)
        step, create = jitted(config, by_rows=False, model=model, accumulate=accumulate)
        found.append(run(step, create(), const, data))
        flops.append(step.lower(create(), data[0], const).cost_analysis()["flops"])
    close(*found)
    assert (flops[0] < 0.7 * flops[1]) == (items == ITEMS)


def test_a_model_of_facts_takes_as_long_whatever_the_catalogue() -> None:
    flops = []
    for rows in (2**12, 2**16):
        step, create = jitted(Optimizer(kind="sgd"), by_rows=False, model=Functional(ByFacts))
        const = jax.eval_shape(lambda rows=rows: knowing(rows, rows - 10))
        flops.append(step.lower(jax.eval_shape(create), batches()[0], const).cost_analysis()["flops"])
    assert flops[1] < 1.1 * flops[0]


def test_a_full_softmax_over_items_of_facts_sees_all_of_them() -> None:
    found = []
    for by_item in (True, False):
        model = Functional(ByFacts)
        model.by_item = by_item
        step, create = jitted(Optimizer(kind="sgd"), by_rows=False, model=model, objective=CatalogueSoftmax())
        found.append(run(step, create(), knowing(), batches(count=1)))
    jax.tree.map(np.testing.assert_array_equal, *found)


class ByCatalogue(Tiny):
    by_item = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": Functional(functools.partial(ByCatalogue, num_rows=V, tied=True, normalize=False))},
            "more of its rows",
        ),
        ({"objective": CatalogueSoftmax()}, "moves every row"),
        ({"config": Optimizer(groups=(("^table$", Group(kind="rowwise_adagrad")),))}, "head would be trained whole"),
        ({"config": Optimizer(groups=(("turn|table|head", Group(kind="rowwise_adam")),))}, "no row for each item"),
    ],
)
def test_what_needs_whole_tables_is_refused(change: dict, message: str) -> None:
    given = {"config": optimizer_of("rowwise_adagrad"), "model": model_of(tied=False), **change}
    with pytest.raises(ConfigError, match=message):
        jitted(given.pop("config"), by_rows=True, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "rowwise_adagrad"},
        {"groups": (("table", Group(kind="rowwise_adagrad")),), "ema_decay": 0.9},
        {"groups": (("table", Group(kind="rowwise_adam", weight_decay=0.1)),)},
    ],
    ids=["for everything", "average", "decay"],
)
def test_optimizers_that_would_move_every_row_are_refused(given: dict) -> None:
    with pytest.raises(ConfigError):
        Optimizer(**given)
