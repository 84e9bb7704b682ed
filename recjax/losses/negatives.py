"""Drawing negatives on the device, the same ones whatever the number of devices.

A draw is a pure function of the key and of facts about the catalogue. Items are drawn with replacement, by chances
that the caller states, so that the probability of each is known for the logQ correction. No draw takes time that
grows with the catalogue: uniform ones are numbers in a range, and weights are summed up once (`cumulate`), not in each
step. Which items a user has already had is not known here.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Sampler = Literal["uniform", "popularity", "in_batch", "mixed"]
Share = Literal["batch", "row", "position"]

# The first row of a table that is an item; rows before it are padding and unknown items.
FIRST_ITEM = 2
_BLOCK = 128


class Cumulative(NamedTuple):
    """Weights summed up in two levels: one cumulative sum over a long catalogue would run out of float32 digits."""

    within: Float[Array, "c w"]
    across: Float[Array, " c"]
    last: Int[Array, ""]


def cumulate(weights: Float[Array, " v"]) -> Cumulative:
    """Running sums within blocks of rows, running sums of the blocks, and the last row with any weight."""
    blocks = jnp.pad(weights.astype(jnp.float32), (0, -weights.shape[0] % _BLOCK)).reshape(-1, _BLOCK)
    within = jnp.cumsum(blocks, axis=1)
    last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    return Cumulative(within, jnp.cumsum(within[:, -1]), last.astype(jnp.int32))


def draw_uniform(key: Key[Array, ""], shape: tuple[int, ...], num_items: Int[Array, ""] | int) -> Int[Array, "..."]:
    """Rows of items drawn independently, each with probability 1 / `num_items`."""
    return jax.random.randint(key, shape, FIRST_ITEM, FIRST_ITEM + num_items, dtype=jnp.int32)


def draw_rows(
    key: Key[Array, ""], shape: tuple[int, ...], weights: Float[Array, " v"] | Cumulative
) -> Int[Array, "..."]:
    """Indices drawn independently with probability `weights / weights.sum()`, by inverse distribution function."""
    within, across, last = weights if isinstance(weights, Cumulative) else cumulate(weights)
    outer_key, inner_key = jax.random.split(key)
    outer = jax.random.uniform(outer_key, shape) * across[-1]
    block = jnp.searchsorted(across, outer, side="right")
    # Rounding may point past the last weight; the last row with any weight is where such a draw belongs.
    block = jnp.minimum(block, last // _BLOCK)
    rows = within[block]
    inner = jax.random.uniform(inner_key, shape) * rows[..., -1]
    row = (rows <= inner[..., None]).sum(-1)
    return jnp.minimum(block * _BLOCK + row, last).astype(jnp.int32)


def popularity_weights(power: float, valid: Bool[Array, " v"], count: Float[Array, " v"]) -> Float[Array, " v"]:
    """`count` to the `power`, zero for rows that are no items."""
    return jnp.where(valid, count**power, 0)


def log_chance(weights: Float[Array, "*n"], log_total: Float[Array, ""] | float) -> Float[Array, "*n"]:
    """Log probability of drawing rows with these `weights`; minus infinity for a weight of 0."""
    return jnp.log(weights) - log_total


def occur_in(rows: Int[Array, "x y n"], items: Int[Array, "b m"]) -> Bool[Array, "b y n"]:
    """Whether each of `rows` (x is 1 or b) is among the `items` of its batch row."""
    ordered = jnp.sort(items, axis=1)
    rows = jnp.broadcast_to(rows, (items.shape[0], *rows.shape[1:]))
    flat = rows.reshape(rows.shape[0], -1)
    at = jax.vmap(jnp.searchsorted)(ordered, flat)
    found = jnp.take_along_axis(ordered, jnp.minimum(at, items.shape[1] - 1), axis=1)
    return (found == flat).reshape(rows.shape)
