"""Products of sorted rows with the matrix of their group: what a mixture of experts spends its time in.

Rows of one expert lie together, and each group meets a matrix of its own, so that no row is dropped or padded however
unequal the groups are. The kernel is a choice of the config and never made silently: `jax.lax.ragged_dot` runs
everywhere, tokamax has kernels for GPU and TPU. A third way, for few experts and for CPU (where XLA writes a ragged
product out as a masked one), needs no groups and is in `recjax.nn.moe`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.core.errors import ConfigError
from recjax.core.sharding import platform

GroupedKernel = Literal["ragged_dot", "tokamax"]


def grouped_product(
    x: Float[Array, "n i"], weights: Float[Array, "e i o"], sizes: Int[Array, " e"], kernel: GroupedKernel
) -> Float[Array, "n o"]:
    """The first `sizes[0]` rows of `x` times `weights[0]`, the next `sizes[1]` times `weights[1]`, and so on.

    Rows past the last group come out as anything at all, and so does their gradient: `rows_of_groups` goes around
    whatever is made of them. Raises `ConfigError` where the kernel is not to be had.
    """
    return _kernel(kernel)(x, weights.astype(x.dtype), sizes)


def rows_of_groups(x: Float[Array, "n d"], sizes: Int[Array, " e"]) -> Float[Array, "n d"]:
    """`x`, and zero past the last group, in the gradient too."""
    inside = jnp.arange(x.shape[0], dtype=sizes.dtype) < sizes.sum()
    return jnp.where(inside[:, None], x, jnp.zeros((), x.dtype))


def _kernel(name: GroupedKernel) -> Callable[..., jax.Array]:
    if name == "ragged_dot":
        return jax.lax.ragged_dot
    if platform() == "cpu":
        raise ConfigError(
            "tokamax has no grouped product for CPU",
            where='MoeConfig.kernel = "tokamax"',
            mend='kernel = "ragged_dot", or "dense" for few experts',
        )
    return _tokamax().ragged_dot


@functools.cache
def _tokamax() -> Any:
    try:
        return importlib.import_module("tokamax")
    except ImportError:
        raise ConfigError(
            "the library tokamax is not installed",
            where='MoeConfig.kernel = "tokamax"',
            mend='pip install tokamax, or kernel = "ragged_dot"',
        ) from None


@jax.custom_vjp
def spread(x: Float[Array, "t d"], order: Int[Array, " n"], inverse: Int[Array, " n"]) -> Float[Array, "n d"]:
    """Row `order[i] // k` of `x` at place i, where n = t k: every row k times, permuted by `order`.

    The gradient gathers by the `inverse` permutation and adds the k up, instead of scattering.
    """
    return jnp.take(x, order // (order.shape[0] // x.shape[0]), axis=0)


def _spread_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, Any]:
    return spread(x, order, inverse), (inverse, x.shape[0])


def _spread_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    inverse, tokens = residuals
    back = jnp.take(g, inverse, axis=0).reshape(tokens, -1, g.shape[-1])
    return back.astype(jnp.float32).sum(1).astype(g.dtype), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def permute(x: Float[Array, "n d"], order: Int[Array, " n"], inverse: Int[Array, " n"]) -> Float[Array, "n d"]:
    """`x[order]`, whose gradient is a gather by the `inverse` permutation."""
    return jnp.take(x, order, axis=0)


permute.defvjp(
    lambda x, order, inverse: (permute(x, order, inverse), inverse),
    lambda inverse, g: (jnp.take(g, inverse, axis=0), None, None),
)
