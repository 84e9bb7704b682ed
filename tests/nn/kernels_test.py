"""Kernels of tokamax: asked for by name, without the way back to XLA that the library has; a stand-in answers here."""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.nn import kernels
from recjax.nn.attention import Masks, attend_dense
from recjax.nn.flash import attend_tokamax
from recjax.nn.grouped import grouped_product


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A module `tokamax` with the signatures of the library, and the implementations that it was asked for."""
    found: list[tuple[str, ...]] = []

    def ragged_dot(lhs: Any, rhs: Any, group_sizes: Any, *, implementation: tuple[str, ...]) -> jax.Array:
        found.append(implementation)
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    def dot_product_attention(
        query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, *, scale: float, implementation: Any
    ) -> jax.Array:
        found.append(implementation)
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)

    module: Any = types.ModuleType("tokamax")
    module.ragged_dot, module.dot_product_attention = ragged_dot, dot_product_attention
    monkeypatch.setitem(sys.modules, "tokamax", module)
    return found


@pytest.mark.parametrize(("device", "own"), [("gpu", ("mosaic", "triton")), ("tpu", ("mosaic",))])
def test_its_own_kernels_and_nothing_else(monkeypatch, asked, device: str, own: tuple[str, ...]) -> None:
    monkeypatch.setattr(kernels, "platform", lambda: device)
    draw = np.random.default_rng(0)
    x, weights = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((9, 4), (3, 4, 5)))
    sizes = jnp.asarray([2, 0, 7], jnp.int32)
    want = np.concatenate([x[:2] @ weights[0], x[2:] @ weights[2]])
    np.testing.assert_allclose(grouped_product(x, weights, sizes, "tokamax"), want, rtol=1e-5)
    q, k, v = (jnp.asarray(draw.normal(size=(1, 6, n, 4)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray([[1, 1, 2, 2, 3, 3]], jnp.int32)
    masks = Masks(segments, segments, parents=jnp.asarray([[0, 0, 1, 1, 1, 1]], jnp.int32))
    got, dense = (f(q, k, v, masks, scale=0.5) for f in (attend_tokamax, attend_dense))
    np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-6)
    assert asked == [own, own]


def test_without_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ConfigError, match="tokamax is not installed"):
        kernels.tokamax(where="MoeConfig", instead="ragged_dot")


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as error:
        kernels.check_device("splash", ("tpu",), where="TransformerConfig", instead="blocks")
    for part in ("splash does not run on cpu", "TransformerConfig.kernel = 'splash'", "kernel = 'blocks'"):
        assert part in str(error.value)
