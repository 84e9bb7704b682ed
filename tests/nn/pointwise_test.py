"""Pointwise attention against its plain reference, and the biases by distance and time against their words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.nn.layout import Layout
from recjax.nn.pointwise import attend_pointwise, attend_pointwise_dense
from recjax.nn.relative import NUM_BUCKETS, _sums_by_comparison, bucket_sums, by_distance, time_buckets

DAY = 86_400


def _inputs(length: int = 23, rows: int = 3, heads: int = 2) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """q, k, v and the two tables; segments; buckets."""
    draw = np.random.default_rng(length)
    q, k, v = (draw.normal(size=(rows, length, heads, width)).astype(np.float32) for width in (8, 8, 6))
    tables = (draw.normal(size=n).astype(np.float32) for n in (length, NUM_BUCKETS))
    segments = np.sort(draw.integers(1, 4, (rows, length)), axis=1)
    segments[0, length - length // 4 :] = 0
    buckets = draw.integers(0, 72, (rows, length, length)).astype(np.int8)
    return tuple(map(jnp.asarray, (q, k, v, *tables))), jnp.asarray(segments, jnp.int32), jnp.asarray(buckets)


@pytest.mark.parametrize(("length", "block"), [(1, 8), (7, 8), (24, 8), (23, 100)])
@pytest.mark.parametrize("biased", [True, False])
def test_blocks_and_their_gradients_equal_the_reference(length: int, block: int, biased: bool) -> None:
    arrays, segments, buckets = _inputs(length)
    probe = jnp.asarray(np.random.default_rng(0).normal(size=arrays[2].shape), jnp.float32)

    def outcome(function, **options):
        def loss(q, k, v, distance, time):
            biases = {"distance_bias": by_distance(distance, length), "time_bias": time, "buckets": buckets}
            out = function(q, k, v, segments, length=50, **(biases if biased else {}), **options)
            return (out * probe).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)))(*arrays)

    got, want = outcome(attend_pointwise, block=block), outcome(attend_pointwise_dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def test_weights_do_not_share_a_sum() -> None:
    """Twice the same event counts twice, which a softmax hides; and the row's padding changes nothing."""
    one = jnp.ones((1, 1, 1, 4))
    alone = attend_pointwise(one, one, one, jnp.ones((1, 1), jnp.int32), length=10)
    twice, segments = jnp.ones((1, 3, 1, 4)), jnp.asarray([[1, 1, 0]])
    np.testing.assert_allclose(attend_pointwise(twice, twice, twice, segments, length=10)[0, 1], 2 * alone[0, 0])


def test_bfloat16_is_close() -> None:
    arrays, segments, buckets = _inputs(40)
    biases = {"distance_bias": by_distance(arrays[3], 40), "time_bias": arrays[4], "buckets": buckets}
    low = attend_pointwise(*(x.astype(jnp.bfloat16) for x in arrays[:3]), segments, length=10, block=16, **biases)
    assert low.dtype == jnp.bfloat16
    want = attend_pointwise_dense(*arrays[:3], segments, length=10, **biases)
    np.testing.assert_allclose(low.astype(jnp.float32), want, atol=0.1)


def test_bias_by_distance_counts_back_from_the_query() -> None:
    got = np.asarray(by_distance(jnp.asarray([5.0, 6.0, 7.0]), 5))
    for q in range(5):
        assert got[q, : q + 1].tolist() == [[5.0, 6.0, 7.0][min(q - s, 2)] for s in range(q + 1)]


def test_sums_by_bucket_are_the_same_either_way() -> None:
    draw = np.random.default_rng(0)
    values = jnp.asarray(draw.normal(size=(2, 9, 9)), jnp.float32)
    buckets = jnp.asarray(draw.integers(0, 72, (2, 9, 9)), jnp.int8)
    want = np.bincount(np.asarray(buckets).ravel(), np.asarray(values).ravel(), minlength=NUM_BUCKETS)
    for function in (bucket_sums, _sums_by_comparison):
        np.testing.assert_allclose(jax.jit(function)(values, buckets), want, atol=1e-5)


def _layout(times: list[int], asked: list[int] | None = None) -> Layout:
    """A row whose times are given in 64 bits and kept in 32."""
    row, *other = (jnp.asarray(np.asarray([t], np.int64).astype(np.int32)) for t in (times, asked) if t is not None)
    ones = jnp.ones_like(row)
    return Layout(ones, ones, row, other[0] if other else None)


def _bucket(seconds: int) -> int:
    return int(np.log(max(abs(seconds), 1)) / 0.301)


def test_buckets_are_those_of_the_formula() -> None:
    times = [0, 1, 2, 60, 3_600, 10 * DAY, 900_000_000, 2_000_000_000]
    got = time_buckets(_layout(times))[0]
    np.testing.assert_array_equal(got, [[_bucket(q - s) for s in times] for q in times])


def test_target_time_takes_the_place_of_the_query() -> None:
    times, asked = [DAY, 3 * DAY, 3 * DAY + 5], [3 * DAY, 3 * DAY + 5, 90 * DAY]
    got = time_buckets(_layout(times, asked))[0]
    np.testing.assert_array_equal(got, [[_bucket(q - s) for s in times] for q in asked])


def test_times_beyond_32_bits_have_the_right_differences() -> None:
    late = 2**31 - 5  # the second event lies beyond
    np.testing.assert_array_equal(
        time_buckets(_layout([late, late + DAY, late + DAY + 7])), time_buckets(_layout([0, DAY, DAY + 7]))
    )


def test_without_times_there_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="its batch has none"):
        time_buckets(Layout(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)))
