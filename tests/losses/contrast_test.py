"""The loss of pairs: its formula, its limits, what it estimates, what does not count, and many devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.fields import FieldShape
from recjax.losses.contrast import PairSoftmax
from recjax.models.pairs import PairTables, Unit
from recjax.nn.norm import unit

B, D, USERS, ITEMS, ROWS = 8, 6, 20, 50, 128
FIRST = 2 + 2 + USERS  # of the items' own values: padding, one unused; missing and unknown of both fields lie between
DRAW = np.random.default_rng(0)
TABLE = jnp.float32(DRAW.normal(size=(ROWS, D)))
COUNT = np.zeros(ROWS, np.float32)
COUNT[FIRST + 2 : FIRST + 2 + ITEMS] = DRAW.integers(1, 40, ITEMS)
CONST = {"item/count": jnp.asarray(COUNT)}
FIELDS = (
    FieldShape(name="user_id", kind="categorical", rows=USERS + 2, offset=2),
    FieldShape(name="item_id", kind="categorical", rows=ITEMS + 2, offset=FIRST),
)


def batch(seed: int = 0, rows: int = B) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {
        "field/user_id": jnp.asarray(draw.integers(4, 4 + USERS, rows), jnp.int32),
        "field/item_id": jnp.asarray(draw.choice(ROWS, rows, p=COUNT / COUNT.sum()), jnp.int32),
        "label/click": jnp.asarray(draw.random(rows) < 0.8, jnp.float32),
        "weight": jnp.ones(rows),
    }


def outputs(b: dict[str, jax.Array], table: jax.Array = TABLE) -> dict[str, Any]:
    parts = [unit(table[b[f"field/{name}"]]) for name in ("user_id", "item_id")]
    return {"user": parts[0], "item": parts[1], "table": Unit(table)}


def test_it_is_its_formula() -> None:
    loss, b = PairSoftmax(num_negatives=5, temperature=0.5), batch()
    b |= loss.draw(b, CONST, jax.random.key(1))
    got = loss(outputs(b), b, CONST, jax.random.key(1))
    v = np.float64(unit(TABLE))
    user, item, label = (np.asarray(b[name]) for name in ("field/user_id", "field/item_id", "label/click"))
    drawn, pairs = np.asarray(b["drawn/pairs/rows"]), np.flatnonzero(label >= 0.5)

    def term(i: int, j: int) -> float:
        expected = 5 / ITEMS + (len(pairs) - 1) * COUNT[j] / COUNT.sum()
        return float(np.exp(v[user[i]] @ v[j] / 0.5) / expected)

    total = 0.0
    for i in pairs:
        own = np.exp(v[user[i]] @ v[item[i]] / 0.5)
        others = [term(i, item[k]) for k in pairs if item[k] != item[i] and user[k] != user[i]]
        total += np.log(own + sum(others) + sum(term(i, j) for j in drawn if j != item[i])) - np.log(own)
    np.testing.assert_allclose(got.total, total, rtol=1e-4)
    assert float(got.weight) == len(pairs) == float(loss.total_weight(b))


def full_softmax(b: dict[str, jax.Array], table: jax.Array, temperature: float) -> jax.Array:
    out, valid = outputs(b, table), jnp.asarray(COUNT > 0)
    scores = jnp.where(valid[None], out["user"] @ unit(table).T / temperature, -jnp.inf)
    own = (out["user"] * out["item"]).sum(1) / temperature
    return ((jax.nn.logsumexp(scores, axis=1) - own) * (b["label/click"] >= 0.5)).sum()


def test_with_every_item_once_and_nothing_of_the_batch_it_is_the_full_softmax() -> None:
    b = batch()
    rows = jnp.asarray(np.flatnonzero(COUNT), jnp.int32)
    every = {"rows": rows, "log_expected": jnp.zeros(ITEMS), "batch_expected": jnp.zeros(B)}
    b |= {f"drawn/pairs/{name}": value for name, value in every.items()}
    loss = PairSoftmax(num_negatives=ITEMS, in_batch=False, temperature=0.2)
    got = loss(outputs(b), b, CONST, jax.random.key(0)).total
    np.testing.assert_allclose(got, full_softmax(b, TABLE, 0.2), rtol=1e-5)


def test_corrected_candidates_estimate_the_sum_over_all_items_without_bias() -> None:
    """The sum of exp(s - log expected) over candidates, own item aside, is that of exp(s) on the mean."""
    loss, draws = PairSoftmax(num_negatives=8, temperature=1.0, exclude_user=False), 4000
    own_user, own_item = 4, int(np.flatnonzero(COUNT)[3])
    v, chance = np.float64(unit(TABLE)), COUNT / COUNT.sum()
    rng = np.random.default_rng(5)
    others = rng.choice(ROWS, (draws, B - 1), p=chance)
    uniform = rng.choice(np.flatnonzero(COUNT), (draws, 8))

    def estimate(items: jax.Array, rows: jax.Array) -> jax.Array:
        b = {
            "field/user_id": jnp.concatenate([jnp.asarray([own_user]), jnp.full(B - 1, own_user + 1)]),
            "field/item_id": jnp.concatenate([jnp.asarray([own_item]), items]),
            "label/click": jnp.ones(B),
            "weight": jnp.ones(B),
        }
        b |= loss.draw(b, CONST, jax.random.key(0)) | {"drawn/pairs/rows": rows}
        b["drawn/pairs/log_expected"] = jnp.log(8 / ITEMS + 7 * CONST["item/count"][rows] / COUNT.sum())
        first = {**b, "weight": jnp.zeros(B).at[0].set(1.0)}
        out = outputs(b)
        keep = jnp.concatenate([jnp.ones(1), jnp.full(B - 1, 1e-6)])  # others are candidates and hardly count
        value = loss(out, {**first, "weight": keep}, CONST, jax.random.key(0)).total
        own = (out["user"][0] * out["item"][0]).sum()
        return jnp.exp(value + own) - jnp.exp(own)

    found = np.asarray(jax.jit(jax.vmap(estimate))(jnp.asarray(others), jnp.asarray(uniform)), np.float64)
    want = sum(np.exp(v[own_user] @ v[j]) for j in np.flatnonzero(COUNT) if j != own_item)
    assert abs(found.mean() - want) < 3 * found.std() / np.sqrt(draws) + 1e-3 * want


def test_own_items_in_disguise_add_nothing() -> None:
    loss, b = PairSoftmax(num_negatives=3), batch()
    same = {name: jnp.repeat(x[:1], B, axis=0) for name, x in b.items()} | {"label/click": jnp.ones(B)}
    item = same["field/item_id"][0]
    same |= {"drawn/pairs/rows": jnp.full(3, item), "drawn/pairs/log_expected": jnp.zeros(3)}
    same["drawn/pairs/batch_expected"] = jnp.zeros(B)
    assert float(loss(outputs(same), same, CONST, jax.random.key(0)).total) == 0.0
    # another item of the same user, met in the batch, counts only when it is told to
    other = {**same, "field/item_id": same["field/item_id"].at[1:].set(item + 1)}
    other |= {"drawn/pairs/rows": jnp.zeros(0, jnp.int32), "drawn/pairs/log_expected": jnp.zeros(0)}
    told = []
    for exclude in (True, False):
        loss = PairSoftmax(num_negatives=0, exclude_user=exclude)
        told.append(float(loss(outputs(other), other, CONST, jax.random.key(0)).total))
    assert told[0] == 0.0 < told[1]


def test_rows_that_are_no_pairs_change_nothing() -> None:
    loss, b = PairSoftmax(num_negatives=4), batch()
    drawn = loss.draw(b, CONST, jax.random.key(2))
    gone = b["label/click"] < 0.5
    assert bool(gone.any())
    other = {**b, "field/item_id": jnp.where(gone, FIRST + 5, b["field/item_id"])}
    drawn["drawn/pairs/batch_expected"] = jnp.zeros(B)
    a, c = (loss(outputs(x), {**x, **drawn}, CONST, jax.random.key(2)).total for x in (b, other))
    np.testing.assert_array_equal(a, c)


def test_names_of_rows_do_not_matter() -> None:
    """Another order of the vocabulary, with tables and counts moved along, gives the same loss."""
    loss, b = PairSoftmax(num_negatives=4), batch()
    drawn = loss.draw(b, CONST, jax.random.key(3))
    order = np.arange(ROWS)
    order[4 : 4 + USERS] = np.random.default_rng(0).permutation(order[4 : 4 + USERS])
    order[FIRST + 2 : FIRST + 2 + ITEMS] = np.random.default_rng(1).permutation(order[FIRST + 2 : FIRST + 2 + ITEMS])
    place = jnp.asarray(np.argsort(order), jnp.int32)
    moved = {name: place[x] if name.startswith("field/") else x for name, x in b.items()}
    rows = {**drawn, "drawn/pairs/rows": place[drawn["drawn/pairs/rows"]]}
    a = loss(outputs(b), {**b, **drawn}, CONST, jax.random.key(3)).total
    c = loss(
        outputs(moved, TABLE[order]), {**moved, **rows}, {"item/count": CONST["item/count"][order]}, jax.random.key(3)
    ).total
    np.testing.assert_allclose(a, c, rtol=1e-5)


@pytest.mark.parametrize(("shape", "preset"), [("data=8", "fsdp"), ("data=4,model=2", "fsdp_model")])
def test_a_mesh_changes_nothing(shape: str, preset: str) -> None:
    """The items of all devices are candidates for the pairs of each."""
    from recjax.core.module import Functional

    loss, b = PairSoftmax(num_negatives=16, symmetric=True), batch(1, 16)
    model = Functional(lambda rngs: PairTables(num_rows=ROWS, fields=FIELDS, width=8, rngs=rngs))
    params = model.init(jax.random.key(0))

    def value(params: Any, b: Any, const: Any) -> jax.Array:
        b = {**b, **loss.draw(b, const, jax.random.key(4))}
        return loss(model.apply(params, b, train=True, key=None), b, const, jax.random.key(4)).total

    want, gradient = jax.value_and_grad(value)(params, b, CONST)
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        placed = jax.device_put(params, mesh.shardings(model.axes))
        got, moved = jax.jit(jax.value_and_grad(value))(
            placed,
            mesh.put_batch({name: np.asarray(x) for name, x in b.items()}),
            {"item/count": mesh.put(COUNT, ("items",))},
        )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(moved["table"]), gradient["table"], rtol=1e-4, atol=1e-5)


def test_an_evaluated_model_says_how_likely_an_item_was_among_all() -> None:
    from recjax.core.module import Functional

    model = Functional(lambda rngs: PairTables(num_rows=ROWS, fields=FIELDS, width=D, temperature=0.3, rngs=rngs))
    b = batch() | {"label/click": jnp.ones(B)}
    out = model.apply({"table": TABLE}, {**b, **CONST}, train=False, key=None)
    np.testing.assert_allclose(out["row/nll"].sum(), full_softmax(b, TABLE, 0.3), rtol=1e-5)
    v = np.asarray(unit(TABLE))
    scores = v[np.asarray(b["field/user_id"])] @ v.T
    better = [(s[COUNT > 0] > s[j]).sum() for s, j in zip(scores, np.asarray(b["field/item_id"]), strict=True)]
    np.testing.assert_array_equal(out["row/recall@10"], np.asarray(better) < 10)
