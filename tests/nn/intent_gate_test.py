"""A gate scales the fields it is for by what another says, and nothing before it is trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.nn.intent_gate import IntentGate
from recjax.nn.interaction import InputShape

SHAPE = InputShape(names=("item", "query", "user", "past"), width=3)
VECTORS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)


def gate() -> Functional:
    return Functional(lambda rngs: IntentGate(by="query", of=("user", "past")).make(SHAPE, rngs=rngs))


def test_a_fresh_gate_changes_nothing_and_can_learn() -> None:
    model = gate()
    params = model.init(jax.random.key(0))
    np.testing.assert_array_equal(model.bind(params)(VECTORS), VECTORS)
    slope = jax.grad(lambda p: (model.bind(p)(VECTORS) ** 2).sum())(params)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(slope))


def test_the_factor_by_hand() -> None:
    weight, bias = np.array([0.5, -2.0, 1.0]), 0.3
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    want = np.array(VECTORS, np.float64)
    for row in want:
        row[2:] *= 2 / (1 + np.exp(-(row[1] @ weight + bias)))
    np.testing.assert_allclose(gate().bind(params)(VECTORS), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("by", "of", "message"),
    [
        ("query", (), "gate nothing"),
        ("query", ("user", "query"), "cannot gate"),
        ("age", ("user",), "no field age"),
        ("query", ("users",), "no field users"),
    ],
)
def test_fields_that_are_not_there_are_named(by: str, of: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IntentGate(by=by, of=of).make(SHAPE, rngs=nnx.Rngs(params=0))
