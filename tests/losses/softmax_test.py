"""The chunked catalogue softmax equals the dense one, however it is cut and wherever the table lies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.state import create
from recjax.core.step import make_train_step
from recjax.losses.softmax import CatalogueSoftmax, catalogue_softmax
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

B, L, D, V = 8, 11, 16, 256
VALID = jnp.asarray((np.arange(V) >= 2) & (np.arange(V) < 205))
CUTS = [("positions", 64 * V), ("items", B * L * 50), ("auto", None)]
MESHES = [
    ("data=8", "data"),
    ("data=8", "fsdp"),
    ("replica=2,data=4", "fsdp"),
    ("data=4,model=2", "fsdp_model"),
    ("replica=2,data=2,model=2", "fsdp_model"),
    ("data=4,expert=2", "fsdp_text"),
    ("replica=2,data=2,model=2", "fsdp_text"),
]


def _inputs(scale: float = 0.5) -> tuple[jax.Array, ...]:
    draw = np.random.default_rng(0)
    hidden, table = draw.normal(size=(B, L, D)), draw.normal(size=(V, D)) * scale
    # Rows that are no items would win every softmax if they were let in.
    table[~np.asarray(VALID)] *= 20
    targets, weight = draw.integers(2, 205, (B, L)), draw.choice([0.0, 1.0, 0.3], (B, L), p=[0.4, 0.4, 0.2])
    weight[3] = 0
    targets = np.where(weight > 0, targets, 0)
    return tuple(jnp.asarray(x) for x in (np.float32(hidden), np.float32(table), np.int32(targets), np.float32(weight)))


def _dense(hidden, table, targets, weight, z_loss):
    logits = jnp.where(VALID[None, None], jnp.einsum("bld,vd->blv", hidden, table, precision="highest"), -1e30)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    nll = log_sum - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((nll + z_loss * log_sum**2) * weight).sum(), (nll * weight).sum()


def _close(got, want, tolerance: float = 1e-5) -> None:
    """To `tolerance` of the largest element of each array."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1e-3 + np.abs(b).max())), got, want
    )


@pytest.mark.parametrize(("method", "chunk"), CUTS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradient_equal_the_dense_ones(method: str, chunk: int | None, z_loss: float) -> None:
    hidden, table, targets, weight = _inputs()

    def ours(h, e):
        return catalogue_softmax(h, e, targets, weight, VALID, z_loss=z_loss, method=method, chunk=chunk)

    dense = functools.partial(_dense, targets=targets, weight=weight, z_loss=z_loss)
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, table) for f in (ours, dense))
    _close(got, want)
    _close(jax.jit(ours)(hidden, table), want[0])
    np.testing.assert_array_equal(got[1][1][~VALID], 0)


@pytest.mark.parametrize(("method", "chunk"), CUTS[:2])
def test_rows_that_come_after_those_that_can_be_valid_are_not_looked_at(method: str, chunk: int) -> None:
    hidden, table, targets, weight = _inputs()
    longer = jnp.concatenate([table, jnp.full((100, table.shape[1]), jnp.nan)])

    def ours(h, e):
        return catalogue_softmax(h, e, targets, weight, VALID, z_loss=1e-2, method=method, chunk=chunk)[0]

    got, want = (jax.value_and_grad(ours, (0, 1))(hidden, e) for e in (longer, table))
    assert got[0] == want[0] and (got[1][0] == want[1][0]).all()
    np.testing.assert_array_equal(got[1][1], jnp.pad(want[1][1], ((0, 100), (0, 0))))


@pytest.mark.parametrize(("method", "chunk"), CUTS[:2])
def test_large_logits_do_not_overflow(method: str, chunk: int) -> None:
    hidden, table, targets, weight = _inputs(scale=40.0)

    def ours(h, e):
        return catalogue_softmax(h, e, targets, weight, VALID, method=method, chunk=chunk)[0]

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, table)
        for f in (ours, lambda h, e: _dense(h, e, targets, weight, 0.0)[0])
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    _close(got, want, 1e-4)


@pytest.mark.parametrize(("method", "chunk"), CUTS[:2])
def test_no_position_weighs_anything(method: str, chunk: int) -> None:
    hidden, table, targets, weight = _inputs()

    def ours(h, e):
        return catalogue_softmax(h, e, targets, 0 * weight, VALID, method=method, chunk=chunk)[0]

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, table)
    assert value == 0 and all((x == 0).all() for x in gradients)


def test_bfloat16_hidden_is_close_and_keeps_its_dtype() -> None:
    hidden, table, targets, weight = _inputs()
    for method, chunk in CUTS[:2]:

        def ours(h, e, method=method, chunk=chunk):
            return catalogue_softmax(h, e, targets, weight, VALID, method=method, chunk=chunk)[0]

        value, (dh, de) = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden.astype(jnp.bfloat16), table)
        assert (value.dtype, dh.dtype, de.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
        want, (want_h, want_e) = jax.value_and_grad(lambda h, e: _dense(h, e, targets, weight, 0.0)[0], (0, 1))(
            hidden, table
        )
        _close((value, dh.astype(jnp.float32), de), (want, want_h, want_e), 0.03)


def test_objective_options_equal_their_words() -> None:
    hidden, table, targets, weight = _inputs()
    objective = CatalogueSoftmax(temperature=0.1)
    out, batch = {"hidden": hidden, "table": table}, {"target_ids": targets, "weight": weight}
    total, amount, metrics = objective(out, batch, {"item_valid": VALID}, jax.random.key(0))
    want = _dense(hidden / 0.1, table, targets, weight, 0.0)[0]
    _close((total, metrics["nll"][0]), (want, want))
    assert amount == weight.sum() == objective.total_weight(batch)


@functools.cache
def _training_loss():
    """A whole model under the objective: one function of (parameters, batch), and its result on one device."""
    config = TransformerConfig(num_layers=1, width=D, num_heads=2, mlp_width=D, dropout=0.1)
    model = Functional(functools.partial(Sequence, num_rows=V, encoder=config, max_length=L, embedding_dropout=0.1))
    _, _, targets, weight = _inputs()
    ids = np.where(np.arange(L) < 9, np.random.default_rng(1).integers(2, 205, (B, L)), 0).astype(np.int32)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    batch = {"history_ids": ids, "positions": positions, "segment_ids": (ids > 0).astype(np.int32)}
    batch |= {"target_ids": np.asarray(targets), "weight": np.asarray(weight)}

    def loss(params, batch, method, chunk):
        out = model.apply(params, batch, train=True, key=jax.random.key(3))
        objective = CatalogueSoftmax(z_loss=1e-3, method=method, chunk=chunk)
        return objective(out, batch, {"item_valid": VALID}, jax.random.key(4)).total

    params = jax.jit(model.init)(jax.random.key(0))
    alone = jax.jit(jax.value_and_grad(functools.partial(loss, method="auto", chunk=None)))(params, batch)
    return model, params, batch, loss, alone


@pytest.mark.parametrize(("shape", "preset"), MESHES)
@pytest.mark.parametrize(("method", "chunk"), CUTS[:2])
def test_many_devices_equal_one_and_gather_only_what_is_small(shape: str, preset: str, method: str, chunk: int) -> None:
    model, params, batch, loss, want = _training_loss()
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        inputs = jax.device_put(params, mesh.shardings(model.axes)), mesh.put_batch(batch)
        step = jax.value_and_grad(functools.partial(loss, method=method, chunk=chunk))
        compiled = jax.jit(step, out_shardings=(mesh.sharding(), mesh.shardings(model.axes))).lower(*inputs).compile()
        got = compiled(*inputs)
    _close(jax.device_get(got), want, 5e-5)
    gathered = re.findall(r"= \(?[a-z0-9]+\[([\d,]+)\]\S* all-gather", compiled.as_text())
    if preset == "fsdp_text":  # the table may be gathered, hidden vectors stay with the rows of their device
        own = B // mesh.size_of("batch")
        assert not [s for s in gathered if s.endswith(f",{D}") and s.count(",") > 1 and int(s.split(",")[0]) > own]
    else:
        assert not [s for s in gathered if np.prod([int(n) for n in s.split(",")]) >= V * D]


def test_a_million_items_need_little_beside_table_gradient_and_moments() -> None:
    """The whole train step holds at most 10% more than table, gradient and Adam's two moments."""
    rows, width = 1_000_064, 64
    config = TransformerConfig(num_layers=2, width=width, num_heads=2, dropout=0.2)
    model = Functional(functools.partial(Sequence, num_rows=rows, encoder=config, max_length=50))
    optimizer = optax.adam(1e-3)

    step = make_train_step(model, (CatalogueSoftmax(),), optimizer, seed=0)
    names = ("history_ids", "positions", "segment_ids", "target_ids")
    batch = {name: jax.ShapeDtypeStruct((32, 50), jnp.int32) for name in names}
    batch["weight"] = jax.ShapeDtypeStruct((32, 50), jnp.float32)
    const = {"item_valid": jax.ShapeDtypeStruct((rows,), bool)}
    state = jax.eval_shape(lambda key: create(model.init(key), optimizer), jax.random.key(0))
    m = jax.jit(step, donate_argnums=0).lower(state, batch, const).compile().memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    assert held < 1.1 * (4 * rows * width * 4)
