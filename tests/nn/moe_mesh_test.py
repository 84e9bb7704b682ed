"""Eight devices give the loss and the gradients of one, dense and with experts, and no expert's weights move."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.losses.router import RouterBalance, RouterZ
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig

B, L, V, E, F = 8, 12, 128, 8, 40
RAGGED, BLOCKS, DENSE = (MoeConfig(num_experts=E, kernel=kernel) for kernel in ("ragged_dot", "blocks", "dense"))
FAST = [(BLOCKS, "data=2,expert=2,model=2", "fsdp_model")]
SLOW = [
    (RAGGED, "data=8", "data"),
    (BLOCKS, "data=2,expert=4", "data"),
    (RAGGED, "data=8", "fsdp"),
    (RAGGED, "data=2,expert=4", "fsdp"),
    (BLOCKS, "replica=2,data=2,expert=2", "fsdp"),
    (RAGGED, "data=4,model=2", "fsdp_model"),
    (RAGGED, "data=2,expert=2,model=2", "fsdp_model"),
    (DENSE, "data=2,expert=2,model=2", "fsdp_model"),
    (None, "data=8", "data"),
    (None, "data=8", "fsdp"),
    (None, "data=2,expert=4", "fsdp"),
    (None, "data=4,model=2", "fsdp_model"),
    (RAGGED, "data=2,expert=4", "fsdp_text"),
    (None, "data=4,model=2", "fsdp_text"),
]


def model_of(moe: MoeConfig | None) -> Functional:
    encoder = TransformerConfig(
        num_layers=2,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=F,
        position="rotary",
        norm="rms",
        ffn="swiglu",
        bias=False,
        tied_head=False,
        unroll=False,
        moe=moe,
    )
    return Functional(functools.partial(Sequence, num_rows=V, encoder=encoder))


def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    real = np.arange(L)[None] < draw.integers(3, L + 1, (B, 1))
    ids = np.where(real, draw.integers(2, V, (B, L)), 0).astype(np.int32)
    segments = np.where(real, 1 + (np.arange(L)[None] >= 5), 0).astype(np.int32)
    positions = np.where(real, np.arange(L) % 5, 0).astype(np.int32)
    weight = real.astype(np.float32)
    return {
        "history_ids": ids,
        "positions": positions,
        "segment_ids": segments,
        "target_ids": np.roll(ids, -1, axis=1),
        "weight": weight,
    }


def loss_of(model: Functional, experts: bool):
    const = {"item_valid": jnp.arange(V) >= 2, "num_items": jnp.int32(V - 2), "item_count": jnp.ones(V)}
    objectives = [CatalogueSoftmax()] + ([RouterBalance(scale=1.0), RouterZ(scale=1.0)] if experts else [])

    def loss(params, batch):
        out = model.apply(params, batch, train=True, key=jax.random.key(0))
        sums = [o(out, batch, const, jax.random.key(0)) for o in objectives]
        return sum(s.total / s.weight for s in sums)

    return jax.value_and_grad(loss)


@functools.cache
def on_one_device(moe: MoeConfig | None):
    model = model_of(moe)
    params = model.init(jax.random.key(0))
    return params, jax.jit(loss_of(model, moe is not None))(params, {k: jnp.asarray(v) for k, v in batch().items()})


@pytest.mark.parametrize(
    ("moe", "shape", "preset"), [*FAST, *(pytest.param(*case, marks=pytest.mark.heavy) for case in SLOW)]
)
def test_the_loss_and_gradients_of_one_device(moe: MoeConfig | None, shape: str, preset: str) -> None:
    params, (loss, gradients) = on_one_device(moe)
    model, mesh = model_of(moe), make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        shardings = mesh.shardings(model.axes)
        run = jax.jit(loss_of(model, moe is not None), out_shardings=(mesh.sharding(), shardings))
        got = run(jax.tree.map(jax.device_put, params, shardings), mesh.put_batch(batch()))
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    for path, want in jax.tree_util.tree_leaves_with_path(gradients):
        here = functools.reduce(lambda tree, key: tree[key.key], path, got[1])
        np.testing.assert_allclose(here, want, atol=1e-4 * float(abs(want).max()), err_msg=str(path))


@pytest.mark.parametrize("shape", [pytest.param("data=8", marks=pytest.mark.heavy), "data=2,expert=4"])
def test_experts_stay_where_they_are(shape: str) -> None:
    """No collective of the compiled step makes an array with the weights of more experts than a device has."""
    model = model_of(RAGGED)
    mesh = make_mesh(MeshConfig(shape=shape, preset="fsdp"))
    with mesh.activate():
        shardings = mesh.shardings(model.axes)
        params = jax.tree.map(jax.device_put, model.init(jax.random.key(0)), shardings)
        run = jax.jit(loss_of(model, True), out_shardings=(mesh.sharding(), shardings))
        text = run.lower(params, mesh.put_batch(batch())).compile().as_text()
    here = E // mesh.size_of("experts")
    gathered = [line for line in text.splitlines() if re.search(r"= .*(all-gather|all-to-all|all-reduce)\(", line)]
    assert gathered
    for line in gathered:
        for dims in re.findall(r"f32\[([\d,]+)\]", line.split(" all-")[0]):
            sizes = [int(n) for n in dims.split(",")]
            assert F not in sizes or np.prod(sizes) <= 2 * here * 16 * F, line
