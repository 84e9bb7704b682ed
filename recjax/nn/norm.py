"""Layer normalisation and root-mean-square normalisation over the width, always in float32."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.module import Module, Rngs, param

NormKind = Literal["layer", "rms"]


class Norm(Module):
    """`layer`: (x - mean) / sd * scale + bias (Ba et al. 2016). `rms`: x / rms * scale (Zhang and Sennrich 2019)."""

    def __init__(self, *, kind: NormKind, width: int, bias: bool, epsilon: float, rngs: Rngs) -> None:
        self.kind, self.epsilon = kind, epsilon
        self.scale = param(rngs, (width,), (None,), nnx.initializers.ones)
        self.bias = param(rngs, (width,), (None,), nnx.initializers.zeros) if bias and kind == "layer" else None

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Normalise the last dimension; the result has the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - x32.mean(-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon) * over(self.scale[...], x)
        if self.bias is not None:
            y = y + over(self.bias[...], x)
        return y.astype(x.dtype)


def over(vector: Float[Array, " d"], x: Float[Array, "*n d"]) -> Float[Array, "*_ d"]:
    """`vector` with as many dimensions as `x`, to be multiplied with it."""
    return vector.reshape(*(1,) * (x.ndim - 1), -1)


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Vectors of length one, in float32 inside; zero stays zero."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).sum(-1, keepdims=True) + 1e-12)).astype(x.dtype)
