"""Drawing negatives on the device, the same ones whatever the number of devices.

A draw is a pure function of the key and of facts about the catalogue. Items are drawn with replacement, in proportion
to weights that the caller states, so that the probability of each is known for the logQ correction. Which items a
user has already had is not known here.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Sampler = Literal["uniform", "popularity", "in_batch"]
Share = Literal["batch", "row", "position"]

_BLOCK = 128


def draw_rows(key: Key[Array, ""], shape: tuple[int, ...], weights: Float[Array, " v"]) -> Int[Array, "..."]:
    """Indices drawn independently with probability `weights / weights.sum()`.

    By inverse distribution function in two levels, blocks of rows and rows within a block: one cumulative sum over a
    long catalogue would run out of float32 digits.
    """
    blocks = jnp.pad(weights.astype(jnp.float32), (0, -weights.shape[0] % _BLOCK)).reshape(-1, _BLOCK)
    within = jnp.cumsum(blocks, axis=1)
    across = jnp.cumsum(within[:, -1])
    outer_key, inner_key = jax.random.split(key)
    outer = jax.random.uniform(outer_key, shape) * across[-1]
    block = jnp.searchsorted(across, outer, side="right")
    # Rounding may point past the last weight; the last row with any weight is where such a draw belongs.
    last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    block = jnp.minimum(block, last // _BLOCK)
    rows = within[block]
    inner = jax.random.uniform(inner_key, shape) * rows[..., -1]
    row = (rows <= inner[..., None]).sum(-1)
    return jnp.minimum(block * _BLOCK + row, last).astype(jnp.int32)


def catalogue_weights(
    sampler: Sampler, power: float, valid: Bool[Array, " v"], count: Float[Array, " v"]
) -> Float[Array, " v"]:
    """What rows are drawn in proportion to, zero for rows that are no items.

    `uniform`: 1. `popularity`: count to the `power`. `in_batch`: count, with which an item turns up in a batch.
    """
    if sampler == "uniform":
        return valid.astype(jnp.float32)
    count = count if sampler == "in_batch" else count**power
    return jnp.where(valid, count, 0)


def log_chance(weights: Float[Array, " v"], rows: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Log probability that a draw gives each of `rows`; a row of weight 0 counts as one of weight 1."""
    chosen = weights[rows]
    return jnp.log(jnp.where(chosen > 0, chosen, 1)) - jnp.log(weights.sum())
