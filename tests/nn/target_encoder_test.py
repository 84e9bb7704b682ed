"""A candidate behind the history of its row: what the encoder makes of the two without padding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.nn.config import TransformerConfig
from recjax.nn.dense import Pass
from recjax.nn.layout import Layout
from recjax.nn.target_encoder import TargetEncoder

WIDTH, LENGTH, CALL = 8, 5, Pass(False, None, None, {})
HSTU = TransformerConfig(width=WIDTH, attention="hstu", position="none", relative="position", ffn="none", max_length=12)
ENCODERS = {
    "hstu": HSTU,
    "softmax": TransformerConfig(width=WIDTH, position="rotary"),
    "wider": TransformerConfig(width=2 * WIDTH, position="rotary"),
}
COUNTS = [5, 3, 0]


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> TransformerConfig:
    return ENCODERS[request.param]


def made(encoder: TransformerConfig) -> tuple[Functional, Any]:
    model = Functional(lambda rngs: TargetEncoder(encoder=encoder).make(WIDTH, rngs=rngs))
    params = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))  # nothing is zero, as after training
    return model, tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def read(model: Functional, params: Any, *arrays: jax.Array, train: bool = False, **more: jax.Array) -> jax.Array:
    """What the model makes, compiled."""
    call = CALL._replace(train=train, key=jax.random.key(3) if train else None)
    return jax.jit(lambda p, *a, **k: model.apply(p, *a, call, **k))(params, *arrays, **more)


def through(dense: Any, x: jax.Array) -> jax.Array:
    return x if dense is None else x @ dense["weight"] + dense["bias"][None, None]


def drawn() -> tuple[jax.Array, jax.Array, jax.Array]:
    draw = np.random.default_rng(0)
    real = np.arange(LENGTH)[None] < np.array(COUNTS)[:, None]
    history = draw.normal(size=(len(COUNTS), LENGTH, WIDTH)) * real[..., None]
    return jnp.float32(draw.normal(size=(len(COUNTS), WIDTH))), jnp.float32(history), jnp.asarray(real)


def test_it_is_the_encoder_on_each_row_without_padding(encoder: TransformerConfig) -> None:
    model, params = made(encoder)
    target, history, real = drawn()
    found = read(model, params, target, history, real)
    alone = Functional(lambda rngs: encoder.make(rngs=rngs))

    @jax.jit
    def reference(params: Any, x: jax.Array) -> jax.Array:
        places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        x = through(params.get("into"), x)
        x = alone.apply(params["encoder"], x, Layout(places, jnp.ones_like(places)), train=False, key=None)
        return through(params.get("back"), x)[0, -1]

    for row, count in enumerate(COUNTS):
        wanted = reference(params, jnp.concatenate([history[row, :count], target[row : row + 1]])[None])
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-5)


def test_padding_and_training_change_nothing(encoder: TransformerConfig) -> None:
    """Dropout is off; what stands in the padding is not looked at."""
    model, params = made(encoder)
    target, history, real = drawn()
    found = read(model, params, target, history, real)
    longer = jnp.pad(history, ((0, 0), (0, 3), (0, 0)), constant_values=7.0)
    padded = read(model, params, target, longer, jnp.pad(real, ((0, 0), (0, 3))))
    trained = read(model, params, target, history, real, train=True)
    np.testing.assert_allclose(padded, found, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trained, found, rtol=1e-5, atol=1e-6)


def test_the_order_of_a_history_matters(encoder: TransformerConfig) -> None:
    model, params = made(encoder)
    target, history, real = drawn()
    turned = history.at[0].set(history[0, ::-1])
    found, other = (read(model, params, target, x, real) for x in (history, turned))
    assert float(jnp.abs(found - other)[0].max()) > 1e-3
    np.testing.assert_array_equal(found[1:], other[1:])


def test_histories_of_contexts_are_those_of_their_rows(encoder: TransformerConfig) -> None:
    model, params = made(encoder)
    target, history, real = drawn()
    owner = jnp.array([2, 0, 0, 1, 2, 1])
    targets = target[jnp.array([0, 1, 2, 2, 0, 1])]
    shared = read(model, params, targets, history, real, owner=owner)
    np.testing.assert_array_equal(shared, read(model, params, targets, history[owner], real[owner]))


def test_what_cannot_read_a_candidate_is_refused() -> None:
    for wrong in (
        TransformerConfig(width=WIDTH),  # learned positions belong to a model of sequences
        TransformerConfig(width=WIDTH, position="rotary", causal=False),
        TransformerConfig(width=WIDTH, attention="hstu", position="none", relative="position_time", ffn="none"),
    ):
        with pytest.raises(ConfigError, match="after a history"):
            TargetEncoder(encoder=wrong)
