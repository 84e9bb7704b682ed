"""The biases of T5: buckets against a brute-force table, and the bias of a whole row against single entries."""

import jax.numpy as jnp
import numpy as np
import pytest

from recjax.nn.relative import T5_BUCKETS, t5_bias, t5_buckets


def brute(apart: int, two_sided: bool) -> int:
    """As in the code of T5, float32 logarithms and all."""
    first, n, buckets = 0, apart, 32
    if two_sided:
        buckets, first, n = 16, 16 if apart < 0 else 0, abs(apart)
    n, exact = max(n, 0), buckets // 2
    if n < exact:
        return first + n
    ratio = np.log(np.float32(n) / exact + np.finfo(np.float32).eps) / np.log(128 / exact)
    return first + min(exact + int(np.float32(ratio) * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("two_sided", [True, False])
def test_buckets_are_those_of_a_brute_force_table(two_sided: bool) -> None:
    apart = np.arange(-300, 301)
    want = [brute(int(n), two_sided) for n in apart]
    np.testing.assert_array_equal(t5_buckets(jnp.asarray(apart), two_sided=two_sided), want)
    assert len(set(want)) == T5_BUCKETS - two_sided  # of two sides, nothing is apart by "minus 0"


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_bias_of_a_row_is_that_of_every_pair(length: int, two_sided: bool) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3, T5_BUCKETS)), jnp.float32)
    place = np.arange(length)
    want = jnp.take(table, t5_buckets(place[:, None] - place[None], two_sided=two_sided), axis=1)
    np.testing.assert_array_equal(t5_bias(table, length, two_sided=two_sided), want)
