"""Products with weights, their gradients in the layout that is fast on the machine."""

import jax
from jaxtyping import Array, Float

from recjax.core.sharding import platform


def linear(
    x: Float[Array, "*n i"], weight: Float[Array, "i o"], bias: Float[Array, " o"] | None
) -> Float[Array, "*n o"]:
    """`x @ weight + bias` in the dtype of `x`."""
    y = _product(x, weight.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype).reshape(*(1,) * (y.ndim - 1), -1)


def transposed(x: Float[Array, "*n i o"]) -> Float[Array, "*n o i"]:
    """The last two dimensions exchanged, for use on the left of a product.

    XLA folds such a transpose into the product, for which it has no fast routine on CPU; there it is kept apart.
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
    return g @ weight.T, transposed(rows) @ g.reshape(-1, g.shape[-1])


_product.defvjp(_forward, _backward)
