"""Splash attention, its program interpreted, against the plain reference; and where kernels of accelerators refuse."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.nn.attention import Masks, attend_dense
from recjax.nn.config import TransformerConfig
from recjax.nn.flash import attend_splash, attend_tokamax

HEADS, GROUPS, WIDTH = 4, 2, 8


def inputs(rows: int, length: int) -> tuple:
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(rows, length, n, WIDTH)), jnp.float32) for n in (HEADS, GROUPS, GROUPS))
    segments = np.sort(draw.integers(1, 4, (rows, length)), axis=1)
    segments[0, length - 20 :] = 0
    segments = jnp.asarray(segments, jnp.int32)
    return q, k, v, Masks(segments, segments)


def outcome(function, q, k, v, masks, **more):
    """The loss and its gradients; nobody asks what a padded slot gives."""
    real = (masks.queries > 0)[..., None, None]

    def loss(q, k, v):
        return jnp.where(real, function(q, k, v, masks, scale=0.4, **more) ** 2, 0).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_splash_is_the_reference(causal: bool) -> None:
    """Rows that are no multiple of its blocks, grouped heads, packed and padded; and the gradients."""
    given = inputs(2, 150)
    got = outcome(partial(attend_splash, interpret=True), *given, causal=causal)
    want = outcome(attend_dense, *given, causal=causal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_splash_on_a_mesh() -> None:
    given = inputs(4, 128)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        got = outcome(partial(attend_splash, interpret=True), *given)
    want = outcome(attend_dense, *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("function", [attend_splash, attend_tokamax])
def test_on_a_cpu_they_are_refused(function) -> None:
    with pytest.raises(ConfigError, match="does not run on cpu"):
        function(*inputs(1, 30))


@pytest.mark.parametrize("field", ["prefix", "parents"])
def test_splash_knows_segments_alone(field: str) -> None:
    q, k, v, masks = inputs(1, 30)
    more = {"prefix": jnp.zeros((1, 30), bool), "parents": jnp.zeros((1, 30), jnp.int32)}
    with pytest.raises(ConfigError, match="no prefix and no parents"):
        attend_splash(q, k, v, masks._replace(**{field: more[field]}), interpret=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kernel": "splash", "attention_dropout": 0.1}, "no attention_dropout"),
        ({"kernel": "tokamax", "attention_dropout": 0.1}, "no attention_dropout"),
        ({"kernel": "splash", "relative": "t5"}, "no bias by relative t5"),
        ({"kernel": "splash", "attention": "hstu", "ffn": "none"}, "hstu"),
    ],
)
def test_settings_that_they_lack_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TransformerConfig(**settings)
