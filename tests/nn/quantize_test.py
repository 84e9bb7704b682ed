"""Residual quantisation and k-means against plain numpy, and what must hold for any vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.nn.quantize import kmeans, lloyd, nearest, quantize, residual_kmeans

RNG = np.random.default_rng(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distances(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    return ((x[:, None].astype(np.float64) - book[None]) ** 2).sum(-1)


QUANTIZE = jax.jit(quantize)  # compiled once for all vectors


@given(st.integers(0, 1000), st.sampled_from([0.1, 1, 30]))
def test_codes_are_those_of_the_definition(seed: int, scale: float) -> None:
    n = 20
    x, books = scale * normal(n, 6, seed=seed), normal(3, 5, 6, seed=seed + 1)
    got = QUANTIZE(x.astype(np.float32), books)
    left = x.astype(np.float64)
    for level in range(3):
        d = distances(left, books[level])
        np.testing.assert_allclose(d[np.arange(n), np.asarray(got.codes)[:, level]], d.min(1), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got.inputs[:, level], left, atol=1e-5)
        left = left - books[level][np.asarray(got.codes)[:, level]]
    # x - sum of what was chosen = what is left in the end
    np.testing.assert_allclose(x - np.asarray(got.chosen).sum(1), left, atol=1e-5)


def test_of_equal_codes_the_first_is_taken() -> None:
    book = jnp.asarray([[1.0, 0], [0, 1], [1, 0]])
    assert nearest(jnp.asarray([[1.0, 0], [0.0, 0]]), book).tolist() == [0, 0]


def test_normalised_levels_see_vectors_of_length_one() -> None:
    got = quantize(jnp.asarray(normal(9, 4)), jnp.asarray(normal(3, 5, 4, seed=1)), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(got.inputs, axis=-1), 1, rtol=1e-5)
    left = np.asarray(got.inputs)[:, 0] - np.asarray(got.chosen)[:, 0]
    np.testing.assert_allclose(got.inputs[:, 1], left / np.linalg.norm(left, axis=1, keepdims=True), rtol=1e-4)


def test_an_iteration_is_that_of_lloyd() -> None:
    x, weight, book = normal(40, 3), RNG.integers(1, 4, 40).astype(np.float32), normal(4, 3, seed=2)
    code = distances(x, book).argmin(1)
    want = [np.average(x[code == c], axis=0, weights=weight[code == c]) for c in range(4)]
    np.testing.assert_allclose(lloyd(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(book)), want, rtol=1e-4)


def test_empty_centres_take_the_rows_farthest_from_theirs() -> None:
    x = np.asarray([[0, 0], [0.1, 0], [3, 0], [0, 5], [9, 9]], np.float32)
    book = jnp.asarray([[0.0, 0], [50, 50], [60, 60]])
    weight = jnp.asarray([1.0, 1, 1, 1, 0])  # a row without weight is never taken
    got = np.asarray(lloyd(jnp.asarray(x), weight, book))
    np.testing.assert_allclose(got, [x[:4].mean(0), x[3], x[2]], rtol=1e-6)


def test_clusters_that_lie_apart_are_found() -> None:
    centres = np.asarray([[0, 0], [10, 0], [0, 10], [10, 10], [-10, 0]], np.float32)
    x = (centres[:, None] + 0.1 * normal(5, 20, 2)).reshape(-1, 2)
    for seed in range(5):
        got = np.asarray(kmeans(jnp.asarray(x), jnp.ones(100), 5, key=jax.random.key(seed)))
        order = distances(centres, got).argmin(1)
        np.testing.assert_allclose(got[order], x.reshape(5, 20, 2).mean(1), rtol=1e-3, atol=1e-3)


def test_rows_without_weight_do_not_count() -> None:
    x = normal(60, 4)
    x[40:] += 100
    weight = (np.arange(60) < 40).astype(np.float32)
    got = kmeans(jnp.asarray(x), jnp.asarray(weight), 6, key=jax.random.key(0))
    assert np.abs(np.asarray(got)).max() < 10


@pytest.mark.parametrize("distinct", [1, 3, 8])
def test_fewer_different_rows_than_centres_are_all_met(distinct: int) -> None:
    x = np.repeat(normal(distinct, 2), 5, axis=0)
    book = np.asarray(kmeans(jnp.asarray(x), jnp.ones(len(x)), 8, key=jax.random.key(1)))
    assert np.isfinite(book).all()
    np.testing.assert_allclose(distances(x, book).min(1), 0, atol=1e-9)


def test_each_level_leaves_less_and_comes_from_the_levels_before() -> None:
    x, weight = jnp.asarray(normal(300, 6)), jnp.ones(300)
    books = residual_kmeans(x, weight, levels=3, size=8, key=jax.random.key(0))
    got = quantize(x, books)
    left = [float(((np.asarray(x) - np.asarray(got.chosen)[:, :c].sum(1)) ** 2).sum()) for c in range(4)]
    assert left[0] > left[1] > left[2] > left[3]
    for level in range(3):  # centres of k-means: the mean of what they are given
        inputs, code = np.asarray(got.inputs)[:, level], np.asarray(got.codes)[:, level]
        for c in np.unique(code):
            np.testing.assert_allclose(inputs[code == c].mean(0), books[level, c], atol=1e-4)
    fewer = residual_kmeans(x, weight, levels=3, size=8, key=jax.random.key(0))
    np.testing.assert_array_equal(fewer, books)


def test_it_is_the_same_on_many_devices() -> None:
    """Rows split over the devices; only the order of sums differs."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(64, 4) + 20 * RNG.integers(0, 2, (64, 1)).astype(np.float32)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    fit = jax.jit(lambda x, w: residual_kmeans(x, w, levels=2, size=4, key=jax.random.key(0)))
    weight = np.ones(64, np.float32)
    many = fit(jax.device_put(x, split), jax.device_put(weight, split))
    np.testing.assert_allclose(many, fit(x, weight), rtol=1e-4, atol=1e-4)
