"""Item vectors out of pieces: sums of rows, whatever the devices, and a plain model in the end."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, with_facts
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.folded import fold
from recjax.models.pieces import PieceSequence
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

V, L, ROWS, B = 128, 8, 200, 8
ITEMS = slice(2, 60)


def pieces_of() -> jax.Array:
    """Up to three pieces for each item, all below 150; none for what is no item."""
    draw = np.random.default_rng(0)
    found = draw.integers(0, 150, (V, 3)).astype(np.int32)
    found[draw.random((V, 3)) < 0.3] = -1
    found[: ITEMS.start] = found[ITEMS.stop :] = -1
    found[ITEMS, 0] = draw.integers(0, 150, ITEMS.stop - ITEMS.start)
    return jnp.asarray(found)


PIECES = pieces_of()


def model_of(**more: Any) -> Functional:
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2, **more.pop("encoder", {}))
    return Functional(functools.partial(PieceSequence, num_rows=V, rows=ROWS, encoder=encoder, max_length=L, **more))


def rows_of(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two packed histories each."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(ITEMS.start, ITEMS.stop, (B, L)).astype(np.int32)
    ids[:, -1] = 0
    segments = np.broadcast_to(np.int32([1, 1, 1, 2, 2, 2, 2, 0]), (B, L)).copy()
    places = np.broadcast_to(np.int32([0, 1, 2, 0, 1, 2, 3, 0]), (B, L)).copy()
    targets = draw.integers(ITEMS.start, ITEMS.stop, (B, L)).astype(np.int32)
    weight = (ids != 0).astype(np.float32)
    return {"history_ids": ids, "segment_ids": segments, "positions": places, "target_ids": targets, "weight": weight}


def outputs(model: Functional, params: Any, batch: Any, pieces: jax.Array = PIECES) -> Any:
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    return model.apply(with_facts(params, {"item/pieces": pieces}), batch, train=False, key=None)


def test_an_item_is_the_sum_of_its_pieces() -> None:
    model = model_of()
    params = model.init(jax.random.key(0))
    assert params["table"].shape == (256, 16)
    got = outputs(model, params, rows_of())["table"]
    table = np.asarray(params["table"], np.float64)
    want = [sum((table[p] for p in row if p >= 0), np.zeros(16)) for row in PIECES.tolist()]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_no_history_depends_on_what_comes_later_or_on_its_neighbour() -> None:
    model, batch = model_of(), rows_of()
    params = model.init(jax.random.key(1))
    want = outputs(model, params, batch)["hidden"]
    for changed, same in ((6, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 2, 3]), (1, [0, 3, 4, 5, 6])):
        ids = batch["history_ids"].copy()
        ids[:, changed] = 2 + (ids[:, changed] - 1) % 50
        got = outputs(model, params, {**batch, "history_ids": ids})["hidden"]
        np.testing.assert_array_equal(got[:, same], want[:, same])
        assert np.abs(got[:, changed] - want[:, changed]).max() > 0


def test_packed_equals_unpacked() -> None:
    model, batch = model_of(), rows_of()
    params = model.init(jax.random.key(1))
    want = outputs(model, params, batch)["hidden"]
    for slots in (slice(0, 3), slice(3, 7)):
        length = slots.stop - slots.start
        alone = {"history_ids": np.zeros((B, L), np.int32)}
        alone["history_ids"][:, :length] = batch["history_ids"][:, slots]
        real = alone["history_ids"] != 0
        alone |= {"segment_ids": real.astype(np.int32), "positions": np.where(real, np.arange(L), 0).astype(np.int32)}
        got = outputs(model, params, alone)["hidden"]
        np.testing.assert_allclose(got[:, :length], want[:, slots], rtol=1e-5, atol=1e-6)


def loss_and_gradient(model: Functional, params: Any, facts: Any, batch: Any, const: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        out = model.apply(with_facts(params, facts), batch, train=True, key=None)
        found = CatalogueSoftmax()(out, batch, const, jax.random.key(0))
        return found.total / found.weight

    return jax.value_and_grad(loss)(params)


def valid() -> np.ndarray:
    rows = np.arange(V)
    return (rows >= ITEMS.start) & (rows < ITEMS.stop)


def test_only_rows_that_are_used_have_a_gradient() -> None:
    model, batch = model_of(), rows_of()
    params = model.init(jax.random.key(2))
    arrays = {k: jnp.asarray(v) for k, v in batch.items()}
    facts = {"item/pieces": PIECES}
    _, gradient = loss_and_gradient(model, params, facts, arrays, {"item_valid": jnp.asarray(valid())})
    moved = np.abs(gradient["table"]).max(axis=1) > 0
    used = np.isin(np.arange(256), np.asarray(PIECES))
    np.testing.assert_array_equal(moved, used)
    assert not used[150:].any()


@pytest.mark.parametrize(
    ("shape", "preset"), [("data=8", "data"), ("data=4,model=2", "fsdp_model"), ("replica=2,data=4", "fsdp")]
)
def test_on_many_devices_as_on_one(shape: str, preset: str) -> None:
    model, batch = model_of(), rows_of()
    params = model.init(jax.random.key(3))
    arrays = {k: jnp.asarray(v) for k, v in batch.items()}
    const = {"item_valid": jnp.asarray(valid())}
    want = loss_and_gradient(model, params, {"item/pieces": PIECES}, arrays, const)
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        split = jax.device_put(params, mesh.shardings(model.axes))
        rows = mesh.sharding(("items",))
        const, facts = jax.device_put((const, {"item/pieces": PIECES}), rows)
        got = jax.jit(functools.partial(loss_and_gradient, model))(split, facts, mesh.put_batch(batch), const)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), got, want)


@pytest.mark.parametrize("more", [{}, {"normalize": True}])
def test_folded_equals_unfolded(more: dict[str, Any]) -> None:
    model, batch = model_of(**more), rows_of()
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    params = with_facts(model.init(jax.random.key(4)), {"item/pieces": PIECES})
    plain, folded = fold(model, params)
    got, want = (m.apply(p, batch, train=False, key=None) for m, p in ((plain, folded), (model, params)))
    assert jax.tree.structure(folded) == jax.tree.structure(plain.init(jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_with_a_row_for_each_item_it_is_the_plain_model() -> None:
    """In what it computes and in what it is said to cost."""
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2)
    model = Functional(functools.partial(PieceSequence, num_rows=V, rows=V, encoder=encoder, max_length=L))
    plain = Functional(functools.partial(Sequence, num_rows=V, encoder=encoder, max_length=L))
    params = model.init(jax.random.key(5))
    own = jnp.arange(V, dtype=jnp.int32)[:, None]
    batch = {name: jnp.asarray(x) for name, x in rows_of().items()}
    got, want = outputs(model, params, batch, own), plain.apply(params, batch, train=False, key=None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)
    flops = [m.bind(p).token_flops(L) for m, p in ((model, params), (plain, plain.init(jax.random.key(0))))]
    assert flops[0] == flops[1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows = 0"):
        Functional(functools.partial(PieceSequence, num_rows=V, rows=0, encoder=TransformerConfig()))
    with pytest.raises(ConfigError, match="one vector each"):
        model_of(encoder={"tied_head": False})
