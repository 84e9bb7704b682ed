"""Draws follow their weights, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.losses.negatives import catalogue_weights, draw_rows, log_chance


@pytest.mark.parametrize("rows", [5, 128, 300])
def test_frequencies_are_the_weights(rows: int) -> None:
    weights = np.random.default_rng(rows).integers(0, 5, rows).astype(np.float32)
    weights[[0, -1]] = 0
    draws = 200_000
    got = np.bincount(draw_rows(jax.random.key(0), (draws // 10, 10), jnp.asarray(weights)).reshape(-1), minlength=rows)
    chance = weights / weights.sum()
    assert got.sum() == draws and not got[chance == 0].any()
    spread = np.sqrt(draws * chance * (1 - chance))
    assert (np.abs(got - draws * chance) <= 4.5 * spread).all()


def test_a_long_catalogue_keeps_its_last_rows() -> None:
    """One float32 cumulative sum over these weights could not tell neighbouring rows apart."""
    rows = 1_000_064
    drawn = np.asarray(draw_rows(jax.random.key(1), (300_000,), jnp.ones(rows)))
    assert len(np.unique(drawn)) > 0.98 * rows * (1 - np.exp(-300_000 / rows))
    assert abs((drawn % 2).mean() - 0.5) < 0.005 and abs((drawn[drawn > rows * 0.9] % 8).mean() - 3.5) < 0.1


def test_same_draws_on_any_number_of_devices() -> None:
    weights, key = np.arange(1, 257, dtype=np.float32), jax.random.key(2)
    alone = draw_rows(key, (8, 6), jnp.asarray(weights))
    mesh = make_mesh(MeshConfig(shape="data=8", preset="fsdp"))
    with mesh.activate():
        split = jax.jit(lambda w: draw_rows(key, (8, 6), w))(jax.device_put(weights, mesh.sharding(("items",))))
    np.testing.assert_array_equal(alone, split)


def test_weights_and_their_log_chance() -> None:
    valid, count = jnp.asarray([False, False, True, True, True]), jnp.asarray([9.0, 9.0, 4.0, 1.0, 0.0])
    np.testing.assert_allclose(catalogue_weights("uniform", 0.5, valid, count), [0, 0, 1, 1, 1])
    np.testing.assert_allclose(catalogue_weights("popularity", 0.5, valid, count), [0, 0, 2, 1, 0])
    weights = catalogue_weights("in_batch", 0.5, valid, count)
    np.testing.assert_allclose(weights, [0, 0, 4, 1, 0])
    np.testing.assert_allclose(np.exp(log_chance(weights, jnp.arange(2, 5))), [0.8, 0.2, 0.2], rtol=1e-6)
