"""Blocked attention against the plain reference, and the mask predicate against its words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.nn.attention import Masks, allowed, attend, attend_dense, attend_library
from recjax.nn.dropout import keep_mask, seed_words


def _inputs(length: int = 23, heads: int = 4, groups: int = 2, rows: int = 3) -> tuple[Any, ...]:
    draw = np.random.default_rng(length)
    q, k, v = (draw.normal(size=(rows, length, n, 8)).astype(np.float32) for n in (heads, groups, groups))
    segments = np.sort(draw.integers(1, 4, (rows, length)), axis=1)
    segments[0, length - length // 4 :] = 0
    segments = jnp.asarray(segments, jnp.int32)
    return *map(jnp.asarray, (q, k, v)), Masks(segments, segments)


def test_allowed_is_causal_within_a_segment() -> None:
    segments = np.array([[1, 1, 2, 2, 2, 0]])
    got = allowed(jnp.arange(6)[None], jnp.arange(6)[None], jnp.asarray(segments), jnp.asarray(segments))
    want = [[[i >= j and segments[0, i] == segments[0, j] for j in range(6)] for i in range(6)]]
    np.testing.assert_array_equal(got, want)


def test_allowed_both_ways_within_a_segment() -> None:
    segments = jnp.asarray([[1, 1, 2, 0]])
    got = allowed(jnp.arange(4)[None], jnp.arange(4)[None], segments, segments, causal=False)
    np.testing.assert_array_equal(got[0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "block", "groups"), [(1, 8, 2), (7, 8, 1), (23, 8, 2), (24, 8, 4), (23, 100, 2)])
def test_blocks_equal_the_reference(length: int, block: int, groups: int, causal: bool) -> None:
    q, k, v, masks = _inputs(length, groups=groups)
    probe = jnp.asarray(np.random.default_rng(0).normal(size=q.shape), jnp.float32)

    def outcome(function):
        loss = jax.value_and_grad(lambda q, k, v: (function(q, k, v, masks, causal=causal) * probe).sum(), (0, 1, 2))
        return jax.jit(loss)(q, k, v)

    got, want = outcome(lambda *x, **order: attend(*x, block=block, **order)), outcome(attend_dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize("causal", [True, False])
def test_scale_bias_and_prefix_equal_the_reference(causal: bool) -> None:
    """All of them at once, and their gradients, which for the bias is a sum over rows."""
    q, k, v, masks = _inputs()
    draw = np.random.default_rng(1)
    bias = jnp.asarray(draw.normal(size=(4, 23, 23)), jnp.float32)
    masks = masks._replace(prefix=jnp.asarray(draw.random((3, 23)) < 0.4))

    def outcome(function, **more):
        def loss(q, k, v, bias):
            return (function(q, k, v, masks, causal=causal, scale=0.7, bias=bias, **more) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(q, k, v, bias)

    want = outcome(attend_dense)
    for got in (outcome(attend, block=8), outcome(attend_library)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5), got, want)


def test_queries_of_other_rows_than_the_keys() -> None:
    """Cross-attention: fewer queries than keys, and the segment numbers of both. Who sees no key has no meaning."""
    q, _, _, few = _inputs(9)
    _, k, v, many = _inputs(23)
    masks = Masks(few.queries, many.keys)
    sees = (few.queries[:, :, None] == many.keys[:, None]).any(-1)[..., None, None]

    def outcome(function, **more):
        def loss(q, k, v):
            return jnp.where(sees, function(q, k, v, masks, causal=False, **more) ** 2, 0).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    got, want = outcome(attend, block=4), outcome(attend_dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_a_prefix_is_seen_by_all_of_its_segment() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2]])
    place = jnp.arange(5)[None]
    got = allowed(place, place, segments, segments, prefix=jnp.asarray([[True, True, False, False, True]]))
    want = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(got[0], want)


@pytest.mark.parametrize("causal", [True, False])
def test_library_kernel_equals_the_reference(causal: bool) -> None:
    inputs = _inputs()
    got, want = (f(*inputs, causal=causal) for f in (attend_library, attend_dense))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_dropout_is_unbiased() -> None:
    q, k, v, masks = _inputs(16)
    keys = jax.random.split(jax.random.key(0), 2000)
    mean = jax.lax.map(lambda key: attend(q, k, v, masks, dropout=0.3, key=key, block=8), keys).mean(0)
    np.testing.assert_allclose(mean, attend_dense(q, k, v, masks), atol=0.12)


def test_dropout_and_its_gradient_are_those_of_one_mask() -> None:
    q, k, v, masks = _inputs(16, groups=4)
    key, rate = jax.random.key(0), 0.3
    keep = keep_mask((3, 4, 16, 16), rate, seed_words(key))
    place = jnp.arange(16)[None]

    def written_out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where(allowed(place, place, *masks[:2])[:, None], scores, -1e30))
        return jnp.einsum("bhqs,bshk->bqhk", jnp.where(keep, weights / (1 - rate), 0), v)

    def outcome(function):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.square(function(*x)).sum(), (0, 1, 2)))(q, k, v)

    got = outcome(lambda *x: attend(*x, masks, dropout=rate, key=key, block=8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, outcome(written_out))


def test_dropout_does_not_depend_on_the_blocks() -> None:
    q, k, v, masks = _inputs(24, groups=4)
    key = jax.random.key(1)
    one, three = (attend(q, k, v, masks, dropout=0.5, key=key, block=b) for b in (24, 8))
    np.testing.assert_allclose(one, three, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_close() -> None:
    inputs = _inputs(40)
    low = attend(*(x.astype(jnp.bfloat16) for x in inputs[:3]), inputs[3], block=16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attend_dense(*inputs), atol=0.05)
