"""The recurrent encoder against a numpy transcription of the gates, and what packing must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.nn.layout import Layout
from recjax.nn.recurrent import Recurrent, RecurrentConfig

TWO = RecurrentConfig(num_layers=2, width=6, hidden=5)


def _model(config: RecurrentConfig) -> tuple[Functional, dict]:
    model, draw = Functional(functools.partial(Recurrent, config)), np.random.default_rng(0)
    params = model.init(jax.random.key(0))
    return model, jax.tree.map(lambda p: p + draw.normal(scale=0.3, size=p.shape).astype(np.float32), params)


def _layout(*lengths: int, slots: int) -> Layout:
    """One row of packed examples of these lengths."""
    positions, segments = np.zeros((2, 1, slots), np.int32)
    at = 0
    for number, length in enumerate(lengths, 1):
        positions[0, at : at + length], segments[0, at : at + length] = np.arange(length), number
        at += length
    return Layout(jnp.asarray(positions), jnp.asarray(segments))


def _apply(config: RecurrentConfig, x: jax.Array, layout: Layout, **kwargs) -> jax.Array:
    model, params = _model(config)
    return jax.jit(lambda x: model.apply(params, x, layout, **{"train": False, "key": None, **kwargs}))(x)


def _transcribe(params: dict, x: np.ndarray) -> np.ndarray:
    """One example, event by event; gates in the order and form of torch.nn.GRU."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    sigmoid = lambda t: 1 / (1 + np.exp(-t))  # noqa: E731
    for layer in (p["layer_0"], p["layer_1"]):
        state, states = np.zeros(layer["state"].shape[0]), []
        for event in x:
            a_r, a_z, a_n = np.einsum("d,dgu->gu", event, layer["input"]) + layer["input_bias"]
            c_r, c_z, c_n = np.einsum("d,dgu->gu", state, layer["state"]) + layer["state_bias"]
            reset, keep = sigmoid(a_r + c_r), sigmoid(a_z + c_z)
            state = (1 - keep) * np.tanh(a_n + reset * c_n) + keep * state
            states.append(state)
        x = np.stack(states)
    return x @ p["out"] + p["out_bias"]


def test_equals_the_transcription_example_by_example() -> None:
    _, params = _model(TWO)
    x = np.random.default_rng(1).normal(size=(1, 9, 6)).astype(np.float32)
    got = np.asarray(_apply(TWO, jnp.asarray(x), _layout(4, 3, slots=9)))[0]
    want = np.concatenate([_transcribe(params, x[0, :4]), _transcribe(params, x[0, 4:7])])
    np.testing.assert_allclose(got[:7], want, rtol=1e-4, atol=1e-5)


def test_no_gradient_from_the_future_or_another_example() -> None:
    model, params = _model(RecurrentConfig(width=6))
    layout = _layout(3, 2, slots=5)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 6)), jnp.float32)
    outputs = jax.jit(jax.jacrev(lambda x: model.apply(params, x, layout, train=False, key=None)[0].sum(-1)))
    segments = np.asarray(layout.segments)
    want = np.tril(np.ones((5, 5), bool)) & (segments.T == segments)
    np.testing.assert_array_equal(np.abs(outputs(x)[:, 0]).sum(-1) > 0, want)


def test_dropout_is_seeded_and_only_in_training() -> None:
    config = RecurrentConfig(width=6, dropout=0.5)
    x, layout = jnp.ones((1, 4, 6)), _layout(4, slots=4)
    one, same, other = (_apply(config, x, layout, train=True, key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    calm = [_apply(config, x, layout, key=key) for key in (None, jax.random.key(0))]
    np.testing.assert_array_equal(*calm)


@pytest.mark.parametrize("change", [{"num_layers": 0}, {"hidden": 0}, {"dropout": 1.0}], ids=str)
def test_mistakes_are_config_errors(change: dict) -> None:
    with pytest.raises(ConfigError):
        RecurrentConfig(**change)
