"""Taking rows of a split table equals taking them of a whole one, and never gathers it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.rows import sum_rows, take_rows
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.launch import hlo
from recjax.launch.cost import cost_of

MESHES = [
    ("data=8", "data"),
    ("data=8", "fsdp"),
    ("replica=2,data=4", "fsdp"),
    ("data=4,model=2", "fsdp_model"),
    ("replica=2,data=2,model=2", "fsdp_model"),
    ("data=4,expert=2", "fsdp_text"),
    ("replica=2,data=2,model=2", "fsdp_text"),
]
V, D = 64, 8


def _loss(table: jax.Array, index: jax.Array, shared: jax.Array) -> jax.Array:
    """A table read three times: by the batch, by an index all devices share, and as a whole."""
    rows, table = take_rows(table, index)
    few, table = take_rows(table, shared, by_batch=False)
    return (jnp.sin(rows) * few.sum()).sum() + jnp.square(table).sum()


def _plain(table: jax.Array, index: jax.Array, shared: jax.Array) -> jax.Array:
    return (jnp.sin(table[index]) * table[shared].sum()).sum() + jnp.square(table).sum()


def _inputs(columns: int) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(columns)
    table = draw.normal(size=(V, D)).astype(np.float32)
    return table, draw.integers(0, V, (8, columns)).astype(np.int32), draw.integers(0, V, 5).astype(np.int32)


def test_one_device_equals_plain_indexing() -> None:
    inputs = tuple(map(jnp.asarray, _inputs(6)))
    got, want = (jax.value_and_grad(f)(*inputs) for f in (_loss, _plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(("shape", "preset"), MESHES)
@pytest.mark.parametrize("columns", [2, 40], ids=["few rows", "many rows"])
def test_split_equals_whole_and_gathers_no_table(shape: str, preset: str, columns: int) -> None:
    table, index, shared = _inputs(columns)
    want = jax.value_and_grad(_plain)(*map(jnp.asarray, (table, index, shared)))
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    names = (("items", "item_width"), ("batch", None), (None,))
    with mesh.activate():
        inputs = [jax.device_put(x, mesh.sharding(n)) for x, n in zip((table, index, shared), names, strict=True)]
        compiled = jax.jit(jax.value_and_grad(_loss)).lower(*inputs).compile()
        got = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    assert not [s for s in gathered if s.split(",")[0] == str(V) and len(s.split(",")) == 2]


def test_columns_send_each_vector_once_and_rows_one_to_every_device() -> None:
    table, index = (jax.ShapeDtypeStruct(s, d) for s, d in (((V, D), np.float32), ((8, 40), np.int32)))
    sent = {}
    for preset, kind in (("fsdp", "reduce-scatter"), ("fsdp_text", "all-to-all")):
        mesh = make_mesh(MeshConfig(shape="data=8", preset=preset))
        shardings = mesh.sharding(("items", "item_width")), mesh.sharding(("batch", None))
        with mesh.activate():
            look_up = jax.jit(lambda table, index: take_rows(table, index)[0], in_shardings=shardings)
            text = look_up.lower(table, index).compile().as_text()
        assert text is not None
        sent[preset] = cost_of(hlo.parse(text), devices=8).sent[kind]
    vectors = 40 * D * 4  # those of one device
    assert sent == {"fsdp": 7 * vectors, "fsdp_text": vectors * 7 / 8}


@pytest.mark.parametrize(("shape", "preset"), MESHES)
def test_sums_of_rows_of_a_split_table_gather_no_table(shape: str, preset: str) -> None:
    draw = np.random.default_rng(7)
    table, index = draw.normal(size=(V, D)).astype(np.float32), draw.integers(-1, V, (128, 3)).astype(np.int32)

    def loss(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.sin(sum_rows(table, index)).sum()

    def plain(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.sin(jnp.where((index >= 0)[..., None], table[index], 0).sum(axis=1)).sum()

    want = jax.value_and_grad(plain)(jnp.asarray(table), jnp.asarray(index))
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        inputs = jax.device_put((table, index), mesh.sharding(("items", None)))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
        got = compiled(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert not re.findall(rf"= f32\[{V},{D}\]\S* all-gather\(", compiled.as_text())
