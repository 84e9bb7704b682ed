"""Dropout from a counter hash instead of a random generator.

Whether an element survives is a pure function of the key and of its index in the global array: nothing is stored
for the backward pass, and any number of devices drops the same elements. The hash is two rounds of the murmur3
finaliser, several times cheaper than threefry on every backend; it is no source of randomness for anything else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, UInt32

Rate = float | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseDropout:
    """Rates that change linearly from the first layer to the last (LSRM: high below, low above; arXiv 2311.11351).

    The mean over the layers is `(low_layer + high_layer) / 2` whatever their number, so that a flat control of the
    same mean is one line.
    """

    low_layer: float = 0.4
    high_layer: float = 0.1

    def rates(self, num_layers: int) -> tuple[float, ...]:
        """One rate for each layer, the lowest layer first; a single layer gets the mean."""
        if num_layers == 1:
            return ((self.low_layer + self.high_layer) / 2,)
        parts = (i / (num_layers - 1) for i in range(num_layers))
        # Not low + i * step, whose last rate may be a rounding error below zero.
        return tuple(self.low_layer * (1 - part) + self.high_layer * part for part in parts)


def dropout(x: Float[Array, "*s"], rate: Rate, key: Key[Array, ""]) -> Float[Array, "*s"]:
    """Zero each element with probability `rate` and scale the others by `1 / (1 - rate)`.

    `rate` may be a traced scalar, such as one entry of a per-layer vector; a static 0 costs nothing.
    """
    if is_zero(rate):
        return x
    return _dropout(x, jnp.asarray(rate, jnp.float32), seed_words(key))


def is_zero(rate: Rate) -> bool:
    """Whether the rate is known, while tracing, to be zero."""
    return isinstance(rate, float | int) and rate == 0


@jax.custom_vjp
def _dropout(x: jax.Array, rate: jax.Array, seed: jax.Array) -> jax.Array:
    return jnp.where(keep_mask(x.shape, rate, seed), x * (1 / (1 - rate)).astype(x.dtype), jnp.zeros((), x.dtype))


def _dropout_forward(x: jax.Array, rate: jax.Array, seed: jax.Array):
    return _dropout(x, rate, seed), (rate, seed)


def _dropout_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    rate, seed = residuals
    return _dropout(g, rate, seed), jnp.zeros_like(rate), np.zeros(seed.shape, jax.dtypes.float0)


_dropout.defvjp(_dropout_forward, _dropout_backward)


def seed_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """Two words that stand for the key."""
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    return jnp.stack([words[0], words[-1]])


def keep_mask(
    shape: tuple[int, ...], rate: ArrayLike, seed: UInt32[Array, "2"], *, first: int = 0, rows: int = 0
) -> Bool[Array, "..."]:
    """Which elements of an array of `shape` survive.

    The array may be a block of a larger one that has `rows` rows in its next-to-last dimension, of which this is
    the block from row `first` on: the block then has that part of the larger array's mask. An index is hashed in two
    parts, the row and the place in it, because arrays may have more elements than a word can count.
    """
    row = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        is_blocked = rows and axis == len(shape) - 2
        index = jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis) + np.uint32(first if is_blocked else 0)
        row = row * np.uint32(rows if is_blocked else size) + index
    row = _mix(row * np.uint32(0x9E3779B1) ^ seed[0]) ^ seed[1]
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    bits = _mix(column * np.uint32(0x9E3779B1) + jnp.broadcast_to(row, shape))
    return bits >= _threshold(rate)


def _threshold(rate: ArrayLike) -> jax.Array:
    return (jnp.asarray(rate) * np.float32(2**32 - 256)).astype(jnp.uint32)


def _mix(z: jax.Array) -> jax.Array:
    z = (z ^ (z >> 16)) * np.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * np.uint32(0xC2B2AE35)
    return z ^ (z >> 16)
