"""Draws follow their weights, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.losses.negatives import (
    FIRST_ITEM,
    cumulate,
    draw_rows,
    draw_uniform,
    log_chance,
    occur_in,
    popularity_weights,
)


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
    np.testing.assert_allclose(popularity_weights(0.5, valid, count), [0, 0, 2, 1, 0])
    weights = popularity_weights(1.0, valid, count)
    np.testing.assert_allclose(weights, [0, 0, 4, 1, 0])
    log_total = jnp.log(cumulate(weights).across[-1])
    np.testing.assert_allclose(np.exp(log_chance(weights[2:], log_total)), [0.8, 0.2, 0], rtol=1e-6)


def test_uniform_draws_are_items_and_even() -> None:
    drawn = np.asarray(draw_uniform(jax.random.key(3), (40_000,), jnp.int32(10)))
    got = np.bincount(drawn, minlength=FIRST_ITEM + 10)
    assert drawn.max() == FIRST_ITEM + 9 and not got[:FIRST_ITEM].any()
    assert (np.abs(got[FIRST_ITEM:] - 4000) < 4.5 * np.sqrt(4000)).all()


@pytest.mark.parametrize("lead", [(1, 1), (6, 1), (6, 4)])
def test_occurrence_equals_brute_force(lead: tuple[int, int]) -> None:
    draw = np.random.default_rng(4)
    rows, items = draw.integers(0, 30, (*lead, 7)), draw.integers(0, 30, (6, 5))
    want = [[[n in items[b] for n in position] for position in rows[b % lead[0]]] for b in range(6)]
    np.testing.assert_array_equal(occur_in(jnp.asarray(rows), jnp.asarray(items)), want)
