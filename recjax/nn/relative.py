"""Biases of attention scores by the distance of two slots, and by that of two events in time.

HSTU (arXiv 2402.17152) has one weight for each distance and one for each bucket of time, shared by the heads of a
layer; T5 (arXiv 1910.10683) one for each head and bucket of distances, shared by the layers of a stack. Which pairs
see each other is not decided here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from recjax.core.errors import ConfigError
from recjax.core.sharding import platform
from recjax.nn.layout import Layout

NUM_BUCKETS = 128
_PER_BUCKET = np.float32(0.301)
# T5: of 32 buckets the first half for single distances, the rest for longer and longer ranges up to 128.
T5_BUCKETS = 32
T5_FURTHEST = 128
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


def t5_bias(table: Float[Array, "h n"], length: int, *, two_sided: bool) -> Float[Array, "h q s"]:
    """`table[:, bucket of q - s]` for slots of a row.

    A row of 2 `length` weights, by s - q modulo that, is repeated and read with rows one shorter, so that each begins
    one later: no gather of all pairs, and a gradient that is a sum.
    """
    apart = np.concatenate([-np.arange(length), np.arange(length, 0, -1)])
    row = jnp.take(table, t5_buckets(apart, two_sided=two_sided), axis=1)
    heads, size = row.shape
    flat = jnp.broadcast_to(row[:, None], (heads, length, size)).reshape(heads, -1)
    return flat[:, : length * (size - 1)].reshape(heads, length, size - 1)[:, :, :length]


def t5_buckets(apart: Int[Array | np.ndarray, "*n"], *, two_sided: bool) -> Int[Array, "*n"]:
    """The bucket of a distance query - key; keys after the query share bucket 0 unless `two_sided`, when they have
    the second half of the buckets."""
    apart = jnp.asarray(apart)
    ranges = jnp.asarray(_t5_ranges(T5_BUCKETS // 2 if two_sided else T5_BUCKETS))
    near = jnp.take(ranges, jnp.minimum(jnp.abs(apart) if two_sided else jnp.maximum(apart, 0), T5_FURTHEST))
    return near + (apart < 0) * (T5_BUCKETS // 2) if two_sided else near


@functools.cache
def _t5_ranges(buckets: int) -> np.ndarray:
    """Bucket of each distance n up to the furthest f, in whole numbers.

    With e = buckets / 2: n below e, and from there on e + floor(e log(n/e) / log(f/e)), at most the last.
    """
    exact = buckets // 2

    def bucket(n: int) -> int:
        steps = range(buckets - exact)
        return exact + max(j for j in steps if n**exact * exact**j >= exact**exact * T5_FURTHEST**j)

    return np.array([n if n < exact else bucket(n) for n in range(T5_FURTHEST + 1)], np.int32)
