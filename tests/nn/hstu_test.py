"""HSTU as a row of the block's config: a numpy transcription of the paper's formula, packing, layers, devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.nn.layout import Layout
from recjax.nn.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(
    num_layers=2, width=8, num_heads=2, head_dim=6, attention="hstu", ffn="none", relative="position_time", max_length=9
)
ROWS, LENGTH = 8, 7


def _model(config: TransformerConfig) -> tuple[Functional, dict, np.ndarray, Layout]:
    """Parameters away from their initial zeros and ones, inputs, and two examples in every row."""
    model, draw = Functional(functools.partial(Transformer, config)), np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + draw.normal(scale=0.3, size=p.shape).astype(np.float32), model.init(jax.random.key(0))
    )
    x = draw.normal(size=(ROWS, LENGTH, config.width)).astype(np.float32)
    segments = np.repeat([[1, 1, 1, 1, 2, 2, 0]], ROWS, 0).astype(np.int32)
    positions = np.repeat([[0, 1, 2, 3, 0, 1, 0]], ROWS, 0).astype(np.int32)
    times = np.cumsum(np.exp(draw.uniform(0, 14, (ROWS, LENGTH))).astype(np.int32), 1).astype(np.int32)
    return model, params, x, Layout(*map(jnp.asarray, (positions, segments, times, times + 1_000)))


def _apply(config: TransformerConfig, params: dict, x: jax.Array, layout: Layout, **kwargs) -> jax.Array:
    model = Functional(functools.partial(Transformer, config))
    options = {"train": False, "key": None, **kwargs}
    return jax.jit(lambda p, x: model.apply(p, x, layout, **options))(params, x)


def _transcribe(c: TransformerConfig, params: dict, x: np.ndarray, layout: Layout) -> np.ndarray:
    """One row, one query and one key at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    _, segments, times, asked = (None if a is None else np.asarray(a, np.int64) for a in layout[:4])
    asked = times if asked is None else asked
    silu = lambda t: t / (1 + np.exp(-t))  # noqa: E731

    def normalise(n: dict, y: np.ndarray) -> np.ndarray:
        y = y - y.mean(-1, keepdims=True)
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm_epsilon) * n["scale"] + n["bias"]

    for i in range(c.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        a, y = layer["attention"], normalise(layer["attention_norm"], x)
        u, v, q, k = (silu(np.einsum("bld,dhk->blhk", y, a[name])) for name in ("gate", "value", "query", "key"))
        mixed = np.zeros_like(v)
        for b, s, t in np.ndindex(ROWS, LENGTH, LENGTH):
            if t > s or segments[b, s] != segments[b, t]:
                continue
            bias = 0.0
            if c.relative != "none":
                bias += a["position_bias"][s - t]
            if c.relative == "position_time":
                bias += a["time_bias"][int(np.log(max(abs(asked[b, s] - times[b, t]), 1)) / 0.301)]
            scores = (q[b, s] * k[b, t]).sum(-1) + bias
            mixed[b, s] += (silu(scores) / c.max_length)[:, None] * v[b, t]
        gated = normalise(a["out_norm"], mixed.reshape(ROWS, LENGTH, -1)) * u.reshape(ROWS, LENGTH, -1)
        x = x + gated @ a["out"].reshape(-1, c.width) + a["out_bias"]
    return normalise(p["final_norm"], x)


@pytest.mark.parametrize("case", ["none", "position", "position_time", "own time"])
def test_equals_the_transcription(case: str) -> None:
    config = dataclasses.replace(TINY, relative="position_time" if case == "own time" else case)
    _, params, x, layout = _model(config)
    if case == "own time":
        layout = layout._replace(query_times=None)
    if case in ("none", "position"):
        layout = Layout(*layout[:2])
    want = _transcribe(config, params, x.astype(np.float64), layout)
    np.testing.assert_allclose(_apply(config, params, x, layout), want, rtol=2e-4, atol=2e-4)


def test_packed_examples_equal_rows_of_their_own() -> None:
    _, params, x, layout = _model(TINY)
    packed = _apply(TINY, params, x, layout)
    second = Layout(*(jnp.asarray(a)[:, 4:6] for a in layout[:4]))
    second = second._replace(segments=jnp.ones_like(second.segments))
    np.testing.assert_allclose(packed[:, 4:6], _apply(TINY, params, x[:, 4:6], second), rtol=1e-4, atol=1e-5)


def test_scan_remat_and_unrolled_agree() -> None:
    config = dataclasses.replace(TINY, dropout=0.2)
    _, params, x, layout = _model(config)

    def outcome(**change):
        c = dataclasses.replace(config, **change)
        loss = lambda p: (_apply(c, p, x, layout, train=True, key=jax.random.key(2)) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss)(params)

    want = outcome(unroll=True)
    for change in ({"unroll": False}, {"unroll": False, "remat": "full"}):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), outcome(**change), want)


@pytest.mark.parametrize(("shape", "preset"), [("data=8", "data"), ("data=4,model=2", "fsdp_model")])
def test_sharded_equals_one_device(shape: str, preset: str) -> None:
    """Values and all gradients, heads over `model`, rows over `data`; no device is sent another's scores or times."""
    model, params, x, layout = _model(TINY)

    def loss(params: dict, x: jax.Array, layout: Layout) -> jax.Array:
        return (model.apply(params, x, layout, train=False, key=None)[:, :6] ** 3).sum()

    want = jax.jit(jax.value_and_grad(loss))(params, x, layout)
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    with mesh.activate():
        placed = jax.device_put(params, mesh.shardings(model.axes))
        rows = jax.device_put((x, layout), mesh.sharding(("batch",)))
        step = jax.jit(jax.value_and_grad(loss)).lower(placed, *rows).compile()
        got = step(placed, *rows)
    assert not re.findall(r"= \w+\[\d+,\d+,[\d,]+\]\S* all-gather", step.as_text())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_bfloat16_computes_close_to_float32() -> None:
    low = dataclasses.replace(TINY, dtype="bfloat16")
    _, params, x, layout = _model(low)
    got = _apply(low, params, x, layout)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), _apply(TINY, params, x, layout), atol=0.2)


@pytest.mark.parametrize("position", ["none", "rotary"])
def test_a_few_slots_are_what_they_are_among_all(position: str) -> None:
    config = dataclasses.replace(TINY, position=position)
    _, params, x, layout = _model(config)
    slots = jnp.tile(jnp.asarray([[3, 5, 0]], jnp.int32), (ROWS, 1))
    got = _apply(config, params, x, layout, query_at=slots)
    np.testing.assert_allclose(got, _apply(config, params, x, layout)[:, [3, 5, 0]], rtol=1e-4, atol=1e-5)


def test_dropout_is_of_what_is_added() -> None:
    config = dataclasses.replace(TINY, dropout=0.5)
    _, params, x, layout = _model(config)
    one, two = (_apply(config, params, x, layout, train=True, key=jax.random.key(i)) for i in range(2))
    assert np.abs(one - two).max() > 1e-2
    np.testing.assert_array_equal(_apply(config, params, x, layout), _apply(TINY, params, x, layout))


@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": 0.1},
        {"causal": False},
        {"kernel": "library"},
        {"num_kv_heads": 1},
        {"attention": "softmax"},
    ],
    ids=str,
)
def test_mistakes_are_config_errors(change: dict) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(TINY, **change)
