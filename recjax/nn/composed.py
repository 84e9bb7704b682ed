"""Inputs of dense layers that are made of parts: a product with what many rows share is made once.

A dense layer is linear, so x W is a sum over parts of x, and what is alike in many rows (the context of all candidates
of a request, an event of a history beside each candidate) need not be multiplied for each of them. `nn.dense.Dense`
takes such an input in the place of an array, and gives what it would give for its `whole`, but for rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.nn.linear import linear


class Shared(NamedTuple):
    """Rows [b, i] whose columns `places` are alike in all rows of one of `contexts` contexts, that of row k being
    `owner[k]`."""

    rows: Float[Array, "b i"]
    owner: Int[Array, " b"]
    contexts: int
    places: tuple[int, ...]

    def whole(self) -> Float[Array, "b i"]:
        """The rows."""
        return self.rows

    def product(
        self, weight: Float[Array, "i o"], bias: Float[Array, " o"] | None, *, rounded: bool
    ) -> Float[Array, "b o"]:
        """x W + b."""
        some = jnp.zeros(self.contexts, self.owner.dtype).at[self.owner].set(jnp.arange(self.owner.shape[0]))
        alike = jnp.asarray(self.places, jnp.int32)
        own = jnp.asarray([k for k in range(weight.shape[0]) if k not in set(self.places)], jnp.int32)
        once = linear(self.rows[some][:, alike], weight[alike], bias, rounded=rounded)
        once = jnp.take(once, self.owner, axis=0)
        return once + linear(self.rows[:, own], weight[own], None, rounded=rounded)


class Compared(NamedTuple):
    """[t, h, t - h, t * h] of a target t [b, d] and each of n events h of its row.

    Events are [b, n, d], or [r, n, d] of contexts, that of row k being `owner[k]`.
    """

    target: Float[Array, "b d"]
    events: Float[Array, "r n d"]
    owner: Int[Array, " b"] | None = None

    def of_rows(self) -> Float[Array, "b n d"]:
        """The events of each row."""
        return taken(self.events, self.owner)

    def whole(self) -> Float[Array, "b n i"]:
        """All four side by side."""
        h = self.of_rows()
        t = jnp.broadcast_to(self.target[:, None], h.shape)
        return jnp.concatenate([t, h, t - h, t * h], axis=2)

    def product(
        self, weight: Float[Array, "i o"], bias: Float[Array, " o"] | None, *, rounded: bool
    ) -> Float[Array, "b n o"]:
        """x W + b: t (W_1 + W_3) once for a row, h (W_2 - W_3) once for a context, and (t * h) W_4."""
        one, two, three, four = jnp.split(weight, 4)
        of_target = linear(self.target, one + three, bias, rounded=rounded)[:, None]
        of_events = taken(linear(self.events, two - three, None, rounded=rounded), self.owner)
        return of_target + of_events + linear(self.target[:, None] * self.of_rows(), four, None, rounded=rounded)


Composed = Shared | Compared


def taken(of_contexts: jax.Array, owner: jax.Array | None) -> jax.Array:
    """What each row's context has; the array itself where rows have no contexts."""
    return of_contexts if owner is None else jnp.take(of_contexts, owner, axis=0)
