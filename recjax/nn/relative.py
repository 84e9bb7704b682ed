"""Biases of attention scores by the distance of two events, in positions and in time (HSTU, arXiv 2402.17152).

One weight for each distance and one for each bucket of time, shared by the heads of a layer. Which pairs see each
other is not decided here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from recjax.core.errors import ConfigError
from recjax.core.sharding import platform
from recjax.nn.layout import Layout

NUM_BUCKETS = 128
_PER_BUCKET = np.float32(0.301)
# Differences of 32-bit times reach no bucket above this one.
_LAST = int(np.log(2.0**31) / _PER_BUCKET)


def time_buckets(layout: Layout) -> Int8[Array, "b q s"]:
    """floor(log(max(|T_q - t_s|, 1)) / 0.301): T_q is when the event after slot q is asked for, t_s the time of s.

    Without query times T_q is the time of the event at q itself. Times may wrap around 32 bits; what counts is their
    difference. Raises `ConfigError` when the batch has no times.
    """
    if layout.times is None:
        raise ConfigError(
            "the model looks at the times of events and its batch has none",
            where="TransformerConfig.relative = 'position_time'",
            expected="a batch with history_time",
            mend="Feed.times = 'history' or 'target', or TransformerConfig.relative = 'position'",
        )
    times = layout.times.astype(jnp.int32)
    asked = times if layout.query_times is None else layout.query_times.astype(jnp.int32)
    apart = jnp.abs(asked[:, :, None] - times[:, None, :]).astype(jnp.uint32)  # |-2^31| is right as unsigned
    seconds = jnp.maximum(apart, np.uint32(1)).astype(jnp.float32)
    return jnp.minimum(jnp.log(seconds) / _PER_BUCKET, _LAST).astype(jnp.int8)


def by_distance(table: Float[Array, " n"], length: int) -> Float[Array, "q s"]:
    """`table[q - s]` for slots of a row; what lies further apart than the table reaches has its last weight."""
    place = np.arange(length)
    apart = np.clip(place[:, None] - place[None, :], 0, table.shape[0] - 1)
    return jnp.take(table, apart, axis=0, mode="clip")


def by_bucket(table: Float[Array, " n"], buckets: Int[Array, "b q s"]) -> Float[Array, "b q s"]:
    """`table[buckets]`."""
    return jnp.take(table, buckets.astype(jnp.int32), axis=0, mode="clip")


def bucket_sums(values: Float[Array, "b q s"], buckets: Int[Array, "b q s"]) -> Float[Array, " n"]:
    """Sum of the values in each of `NUM_BUCKETS` buckets: the gradient of `by_bucket`.

    On a CPU one pass that adds; elsewhere, where many threads would wait for the same few sums, by comparison with
    every bucket there can be.
    """
    if platform() == "cpu":
        return jnp.zeros(NUM_BUCKETS, values.dtype).at[buckets.astype(jnp.int32)].add(values, mode="clip")
    return _sums_by_comparison(values, buckets)


def _sums_by_comparison(values: jax.Array, buckets: jax.Array) -> jax.Array:
    hit = buckets[..., None] == jnp.arange(_LAST + 1, dtype=buckets.dtype)[None, None, None]
    sums = jnp.where(hit, values[..., None], 0).sum((0, 1, 2))
    return jnp.pad(sums, (0, NUM_BUCKETS - _LAST - 1))
