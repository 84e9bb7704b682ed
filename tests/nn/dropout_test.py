"""Dropout: unbiased, independent of device count, no visible pattern in the hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.nn.dropout import LayerwiseDropout, dropout, keep_mask, seed_words

SHAPE = (64, 50, 64)
SIZE = np.prod(SHAPE)


def _kept(key: jax.Array, rate: float, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.asarray(keep_mask(shape, jnp.float32(rate), seed_words(key)))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_share_of_survivors_and_mean(rate: float) -> None:
    spread = 4 * np.sqrt(rate * (1 - rate) / SIZE)
    for seed in range(4):
        key = jax.random.key(seed)
        assert abs(_kept(key, rate).mean() - (1 - rate)) < spread
        assert abs(float(dropout(jnp.ones(SHAPE), rate, key).mean()) - 1) < spread / (1 - rate)


def test_survivors_look_independent() -> None:
    """Correlation of the mask with itself one step along each axis, and with the masks of other keys."""
    spread = 4.5 / np.sqrt(SIZE)
    root = jax.random.key(7)
    masks = [_kept(jax.random.fold_in(root, i), 0.3) - 0.7 for i in range(6)]
    for axis in range(3):
        for step in (1, 2, 32):
            moved = np.roll(masks[0], step, axis)
            assert abs((masks[0] * moved).mean() / 0.21) < spread, (axis, step)
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a * b).mean() / 0.21) < spread


def test_counts_per_row_and_column_are_binomial() -> None:
    mask = _kept(jax.random.key(3), 0.2, (2048, 256))
    for axis, trials in ((0, 2048), (1, 256)):
        counts = mask.sum(axis)
        assert abs(counts.mean() / trials - 0.8) < 0.004
        assert 0.8 < counts.var() / (trials * 0.16) < 1.2


def test_gradient_drops_the_same_elements() -> None:
    key = jax.random.key(0)
    y, pull = jax.vjp(lambda x: dropout(x, 0.4, key), jnp.ones(SHAPE))
    np.testing.assert_array_equal(pull(jnp.ones(SHAPE))[0], y)


def test_traced_rate_equals_static_rate() -> None:
    key, x = jax.random.key(0), jnp.ones((4, 8))
    traced = jax.jit(lambda r: dropout(x, r, key))(jnp.float32(0.25))
    np.testing.assert_array_equal(traced, dropout(x, 0.25, key))
    assert dropout(x, 0.0, key) is x
    np.testing.assert_array_equal(dropout(x, jnp.float32(0), key), x)


def test_same_elements_on_any_number_of_devices() -> None:
    key, x = jax.random.key(5), np.ones((16, 6, 8), np.float32)
    alone = dropout(jnp.asarray(x), 0.5, key)
    mesh = make_mesh(MeshConfig(shape="data=8"))
    with mesh.activate():
        split = jax.jit(lambda x: dropout(x, 0.5, key))(jax.device_put(x, mesh.sharding(("batch",))))
    np.testing.assert_array_equal(alone, split)


def test_block_of_a_mask_is_a_part_of_it() -> None:
    seed, rate = seed_words(jax.random.key(1)), jnp.float32(0.3)
    whole = keep_mask((2, 6, 10), rate, seed)
    np.testing.assert_array_equal(keep_mask((2, 3, 10), rate, seed, first=2, rows=6), whole[:, 2:5])


@pytest.mark.parametrize("layers", [1, 2, 5, 24])
def test_layerwise_rates_are_linear_and_keep_the_mean(layers: int) -> None:
    rates = LayerwiseDropout(low_layer=0.4, high_layer=0.1).rates(layers)
    assert len(rates) == layers
    assert np.mean(rates) == pytest.approx(0.25)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    if layers > 1:
        assert rates[0] == pytest.approx(0.4) and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.0), (0.0, 0.2), (0.1, 0.3), (0.7, 0.7)])
def test_layerwise_rates_end_where_they_are_told_to(low: float, high: float) -> None:
    for layers in range(2, 65):
        rates = LayerwiseDropout(low_layer=low, high_layer=high).rates(layers)
        assert (rates[0], rates[-1]) == (low, high) and min(rates) >= 0
