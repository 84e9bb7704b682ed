"""What lies where in a batch of rows: the arrays that tell an encoder which slots belong together and when they were.

An encoder sees vectors and a `Layout`, never ids, so that any of them (transformer, recurrent) can stand in any model.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Layout(NamedTuple):
    """The slots of rows [b, l].

    `positions` restart at 0 for each example packed into a row, `segments` number the examples from 1 on and are 0
    where padded. `times` are those of the events, `query_times` when the event after each one is asked for, in
    seconds; None where the batch has none. Slots of the `prefix` are seen by the earlier slots of their example, too:
    a prompt that is read as a whole before a causal answer. `parents` name, by segment number, another example of the
    row whose earlier slots a slot sees besides those of its own; 0 names none. Candidates that share a prompt are
    segments with that prompt as parent, and do not see each other.
    """

    positions: Int[Array, "b l"]
    segments: Int[Array, "b l"]
    times: Int[Array, "b l"] | None = None
    query_times: Int[Array, "b l"] | None = None
    prefix: Bool[Array, "b l"] | None = None
    parents: Int[Array, "b l"] | None = None

    def at(self, slots: Int[Array, "b q"]) -> "Layout":
        """Where some of the slots lie: their positions and segments."""
        return Layout(*(jnp.take_along_axis(x, slots, axis=1) for x in (self.positions, self.segments)))


class Source(NamedTuple):
    """What another stack made of its rows, for cross-attention: a slot is seen by the slots of its segment number."""

    hidden: Float[Array, "b s d"]
    segments: Int[Array, "b s"]
