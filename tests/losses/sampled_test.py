"""Sampled softmax: its formula, its limit, what it estimates, and the same value on many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.losses.sampled import SampledSoftmax, Scores, sampled_softmax
from recjax.losses.softmax import catalogue_softmax

B, L, D, V = 8, 5, 4, 128
ITEMS = 60
VALID = jnp.asarray((np.arange(V) >= 2) & (np.arange(V) < 2 + ITEMS))
COUNT = jnp.where(VALID, jnp.asarray(np.random.default_rng(9).integers(1, 50, V), jnp.float32), 0)
CONST = {"item_valid": VALID, "item_count": COUNT}


def _inputs() -> tuple[dict, dict]:
    draw = np.random.default_rng(0)
    out = {"hidden": draw.normal(size=(B, L, D)), "table": draw.normal(size=(V, D))}
    weight = draw.choice([0.0, 1.0, 0.5], (B, L))
    batch = {"target_ids": np.where(weight > 0, draw.integers(2, 2 + ITEMS, (B, L)), 0).astype(np.int32)}
    batch["weight"] = weight.astype(np.float32)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), out), jax.tree.map(jnp.asarray, batch)


def _random_scores(n: int = 6) -> Scores:
    draw = np.random.default_rng(1)
    target, negative, hit = draw.normal(size=(B, L)), draw.normal(size=(B, L, n)), draw.random((B, L, n)) < 0.3
    expected = draw.normal(size=(1, 1, n))
    return Scores(*(jnp.asarray(x, jnp.float32) for x in (target, negative)), jnp.asarray(hit), jnp.float32(expected))


@pytest.mark.parametrize("logq", [True, False])
def test_equals_its_formula(logq: bool) -> None:
    scores = _random_scores()
    got = sampled_softmax(scores, logq=logq)
    target, negative, hit, expected = (np.asarray(x) for x in scores)
    for b, i in np.ndindex(B, L):
        total = np.exp(target[b, i])
        for j in np.flatnonzero(~hit[b, i]):
            total += np.exp(negative[b, i, j] - (expected[0, 0, j] if logq else 0))
        np.testing.assert_allclose(got[b, i], np.log(total) - target[b, i], rtol=1e-5, atol=1e-6)


def test_every_item_once_is_the_full_softmax() -> None:
    out, batch = _inputs()
    hidden, table, targets = out["hidden"], out["table"], batch["target_ids"]
    items = jnp.arange(2, 2 + ITEMS)

    def sampled(hidden: jax.Array, table: jax.Array) -> jax.Array:
        target = (hidden * table[targets]).sum(-1)
        hit = items[None, None] == targets[..., None]
        scores = Scores(target, jnp.einsum("bld,nd->bln", hidden, table[items]), hit, jnp.zeros((1, 1, ITEMS)))
        return (sampled_softmax(scores, logq=True) * batch["weight"]).sum()

    def full(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return catalogue_softmax(hidden, table, targets, batch["weight"], VALID)[0]

    got, want = (jax.value_and_grad(f, (0, 1))(hidden, table) for f in (sampled, full))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("sampler", ["uniform", "popularity", "mixed"])
def test_partition_function_is_estimated_without_bias(sampler: str) -> None:
    """With the logQ correction, exp(loss) times exp(target logit) has the mean of the full sum of exponentials."""
    out, batch = _inputs()
    targets = jax.random.randint(jax.random.key(1), (B, L), 2, 2 + ITEMS, jnp.int32)
    batch = {**batch, "target_ids": targets, "weight": jnp.ones((B, L))}
    # In-batch negatives come as often as the log has them: here the batch is the log.
    count = jnp.bincount(targets.ravel(), length=V).astype(jnp.float32) if sampler == "mixed" else COUNT
    const = {"item_valid": VALID, "item_count": count}

    class Partition(SampledSoftmax):
        def position_loss(self, scores, num_items):
            return jnp.exp(super().position_loss(scores, num_items) + scores.target)

    estimate = Partition(num_negatives=32, sampler=sampler, power=0.7)
    const |= estimate.prepare(const)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.lax.map(lambda key: estimate(out, batch, const, key).total, keys)
    want = np.where(VALID, np.exp(np.einsum("bld,vd->blv", out["hidden"], out["table"])), 0).sum()
    error = np.std(drawn) / np.sqrt(len(keys))
    assert abs(np.mean(drawn) - want) < 4 * error and error < 0.02 * want


@pytest.mark.parametrize("share", ["batch", "row", "position"])
@pytest.mark.parametrize("sampler", ["uniform", "popularity", "mixed"])
def test_many_devices_equal_one(share: str, sampler: str) -> None:
    out, batch = _inputs()
    objective = SampledSoftmax(num_negatives=16, sampler=sampler, share=share, temperature=0.2)

    @functools.partial(jax.value_and_grad, has_aux=False)
    def loss(out, batch):
        return objective(out, batch, CONST, jax.random.key(5)).total

    want = jax.jit(loss)(out, batch)
    for shape, preset in (("data=8", "fsdp"), ("replica=2,data=2,model=2", "fsdp_model")):
        mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
        with mesh.activate():
            names = {"hidden": ("batch", None, None), "table": ("items", None)}
            parts = {k: jax.device_put(v, mesh.sharding(names[k])) for k, v in out.items()}
            got = jax.jit(loss)(parts, mesh.put_batch(jax.device_get(batch)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), jax.device_get(got), want)


def test_what_is_prepared_and_drawn_before_gives_the_same_loss() -> None:
    out, batch = _inputs()
    for sampler in ("uniform", "popularity", "in_batch", "mixed"):
        objective = SampledSoftmax(num_negatives=7, sampler=sampler, share="row", power=0.5)
        const = {**CONST, "num_items": jnp.int32(ITEMS), **objective.prepare(CONST)}
        drawn = objective.draw(batch, const, jax.random.key(1))
        assert {k: v.shape for k, v in drawn.items()} == dict.fromkeys(drawn, (B, 1, 7))
        want = objective(out, batch, CONST, jax.random.key(1)).total
        got = objective(out, {**batch, **drawn}, const, jax.random.key(2)).total
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_vectors_that_depend_on_the_position() -> None:
    """A table that answers `rows` gives what the same vectors in an array give."""
    out, batch = _inputs()

    class Table:
        def rows(self, ids: jax.Array) -> jax.Array:
            return out["table"][ids] * scale[:, :, None, None]

    scale = jnp.linspace(0.5, 2, B * L).reshape(B, L)
    for share in ("batch", "row", "position"):
        objective = SampledSoftmax(num_negatives=5, share=share)
        got = objective({**out, "table": Table()}, batch, CONST, jax.random.key(3)).total
        # The scale of an item vector and of the hidden vector are the same to a dot product.
        scaled = {**out, "hidden": out["hidden"] * scale[..., None]}
        np.testing.assert_allclose(got, objective(scaled, batch, CONST, jax.random.key(3)).total, rtol=1e-5)


def test_items_of_the_row_are_no_negatives() -> None:
    out, batch = _inputs()
    batch["history_ids"] = jnp.roll(batch["target_ids"], 1, axis=1)
    objective = SampledSoftmax(num_negatives=200, exclude_row=True)
    drawn = objective.draw(batch, CONST, jax.random.key(0))
    hit = np.asarray(objective.scores(out, {**batch, **drawn}, CONST).hit)
    rows = np.asarray(drawn["drawn/next_item/rows"])[0, 0]
    for b, i in np.ndindex(B, L):
        np.testing.assert_array_equal(hit[b, i], np.isin(rows, batch["target_ids"][b]))
    assert 0 < hit.sum() < hit.size
