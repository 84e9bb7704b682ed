"""Speeds of rotary positions under every scaling: against the formulas, against transformers, and on a whole model."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.rotary import RopeScaling, rates, rotary

WIDTH, THETA, TRAINED = 64, 10000.0, 2048
PLAIN = np.array([THETA ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])


def test_plain_and_linear_and_ntk() -> None:
    np.testing.assert_allclose(rates(WIDTH, THETA, None), PLAIN, rtol=1e-6)
    linear = RopeScaling(kind="linear", factor=4.0, trained_length=TRAINED)
    np.testing.assert_allclose(rates(WIDTH, THETA, linear), PLAIN / 4, rtol=1e-6)
    ntk = rates(WIDTH, THETA, RopeScaling(kind="ntk", factor=4.0, trained_length=TRAINED))
    np.testing.assert_allclose(ntk[[0, -1]], [1.0, PLAIN[-1] / 4], rtol=1e-5)
    assert (ntk <= PLAIN * (1 + 1e-6)).all() and linear.growth == 1


def test_yarn_by_the_paper() -> None:
    """Few turns over the trained length: interpolated whole; many: untouched; cosines and sines 0.1 ln s + 1 longer."""
    yarn = RopeScaling(kind="yarn", factor=8.0, trained_length=TRAINED)
    turns, slowed = TRAINED * PLAIN / (2 * math.pi), PLAIN / rates(WIDTH, THETA, yarn)
    np.testing.assert_allclose(slowed[turns > 40], 1, rtol=1e-5)
    np.testing.assert_allclose(slowed[turns < 0.8], 8, rtol=1e-5)
    assert (np.diff(slowed) >= -1e-5).all()
    x = jnp.ones((1, 1, 1, WIDTH))
    still = rotary(x, jnp.zeros((1, 1), jnp.int32), theta=THETA, scaling=yarn)
    np.testing.assert_allclose(still, x * (0.1 * math.log(8) + 1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_speeds_are_those_of_transformers(kind: str, theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    ropes = pytest.importorskip("transformers.modeling_rope_utils")
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": theta}
    rope |= {} if kind == "linear" else {"original_max_position_embeddings": TRAINED}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = transformers.LlamaConfig(
        hidden_size=4 * WIDTH, num_attention_heads=4, max_position_embeddings=4 * TRAINED, rope_parameters=rope
    )
    speeds, growth = ropes.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    ours = RopeScaling(kind=kind, factor=4.0, trained_length=TRAINED)
    np.testing.assert_allclose(rates(WIDTH, theta, ours), speeds.numpy(), rtol=1e-5)
    assert growth == pytest.approx(ours.growth)


def test_a_finished_model_reads_longer_texts() -> None:
    """The same parameters under another scaling: linear by two gives at positions 2p what p gave, and caches hold."""
    base = TransformerConfig(num_layers=2, width=16, num_heads=2, position="rotary", norm="rms", rope_theta=500.0)
    slow = RopeScaling(kind="linear", factor=2.0, trained_length=8)
    models = [
        Functional(partial(Sequence, num_rows=128, encoder=TransformerConfig(**{**vars(base), "rope_scaling": s})))
        for s in (None, slow)
    ]
    params = models[0].init(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(models[1].init(jax.random.key(0)))
    ids = jnp.asarray(np.random.default_rng(0).integers(2, 60, (1, 8)), jnp.int32)
    place = jnp.arange(8, dtype=jnp.int32)[None]
    batch = {"history_ids": ids, "segment_ids": jnp.ones_like(ids), "positions": place}
    run = [jax.jit(partial(m.apply, train=False, key=None)) for m in models]
    want = run[0](params, batch)["hidden"]
    np.testing.assert_allclose(run[1](params, {**batch, "positions": 2 * place})["hidden"], want, rtol=1e-4, atol=1e-5)
    assert float(abs(run[1](params, batch)["hidden"] - want).max()) > 1e-3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RopeScaling(factor=0.5), "factor = 0.5"),
        (lambda: RopeScaling(fast=1.0, slow=2.0), "slow < fast"),
        (lambda: TransformerConfig(rope_scaling=RopeScaling()), "goes with rotary"),
        (lambda: TransformerConfig(position="rotary", rope_theta=1.0), "rope_theta"),
    ],
)
def test_what_makes_no_sense_is_refused(make, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
