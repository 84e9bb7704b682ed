"""Embedding lookups: rows of a table by id, where id 0 is padding.

The table itself is a parameter of the model; this file holds what one does with it. Tables split over devices are
the business of `recjax.core.rows`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.core.rows import take_rows

PAD = 0


def lookup(table: Float[Array, "v d"], ids: Int[Array, "b *l"]) -> Float[Array, "b *l d"]:
    """`table[ids]`, zero where the id is padding; no gradient reaches the padding row."""
    return lookup_and_pass(table, ids)[0]


def lookup_and_pass(
    table: Float[Array, "v d"], ids: Int[Array, "b *l"]
) -> tuple[Float[Array, "b *l d"], Float[Array, "v d"]]:
    """`lookup`, and the table for its next use (see `recjax.core.rows`): a tied table then has one gradient array."""
    rows, table = take_rows(table, ids)
    return jnp.where((ids == PAD)[..., None], jnp.zeros((), rows.dtype), rows), table
