"""What lies where in a batch of rows: the arrays that tell an encoder which slots belong together and when they were.

An encoder sees vectors and a `Layout`, never ids, so that any of them (transformer, recurrent) can stand in any model.
"""

from typing import NamedTuple

from jaxtyping import Array, Int


class Layout(NamedTuple):
    """The slots of rows [b, l].

    `positions` restart at 0 for each example packed into a row, `segments` number the examples from 1 on and are 0
    where padded. `times` are those of the events, `query_times` when the event after each one is asked for, in
    seconds; None where the batch has none.
    """

    positions: Int[Array, "b l"]
    segments: Int[Array, "b l"]
    times: Int[Array, "b l"] | None = None
    query_times: Int[Array, "b l"] | None = None
