"""Products with weights, their gradients in the layout that is fast on the machine."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.core.sharding import platform

_BLOCKS, _PARTS = 8, 4
_WIDE = 256  # from here on the folded product is the faster one on CPU


def linear(
    x: Float[Array, "*n i"],
    weight: Float[Array, "i o"],
    bias: Float[Array, " o"] | None,
    *,
    rounded: bool = False,
) -> Float[Array, "*n o"]:
    """`x @ weight + bias` in the dtype of `x`.

    `rounded` rounds the factors of every product, in the gradient too, to bfloat16 and adds up in float32, which a CPU
    with AMX does three times as fast, and an accelerator many times.
    """
    y = _rounded(x, weight) if rounded else _product(x, weight.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype).reshape(*(1,) * (y.ndim - 1), -1)


def transposed(x: Float[Array, "*n i o"]) -> Float[Array, "*n o i"]:
    """The last two dimensions exchanged, for use on the left of a product.

    XLA folds such a transpose into the product, for which it has no fast routine for narrow vectors on CPU; there it
    is kept apart.
    """
    x = x.swapaxes(-1, -2)
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ weight, (x, weight)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    rows = x.reshape(-1, x.shape[-1])
    left = rows.T if rows.shape[1] >= _WIDE else transposed(rows)
    return g @ weight.T, left @ g.reshape(-1, g.shape[-1])


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _rounded(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _halves(x, weight)


def _rounded_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _halves(x, weight), (x, weight)


def _rounded_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    rows, sums = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if platform() != "cpu":
        return _halves(g, weight.T), _halves(rows.T, sums).astype(weight.dtype)
    turned = _turned(weight, 1, _BLOCKS).reshape(weight.shape[1], -1)
    parts = _turned(rows, 0, _PARTS)
    d_weight = functools.reduce(jnp.add, map(_halves, parts, jnp.split(sums, len(parts))))
    return _halves(g, turned), d_weight.astype(weight.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)


def _halves(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _turned(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """`x` cut along `axis` into some equal parts, at most `parts`: each transposed, rounded to bfloat16, written out.

    XLA would fold a plain transpose into the product that follows, and the fast product of a CPU reads rows.
    """
    parts = math.gcd(x.shape[axis], parts)
    size = x.shape[axis] // parts

    def part(start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis).T.astype(jnp.bfloat16)

    return jax.lax.map(part, jnp.arange(parts) * size)
