"""Stored weights: how far they are from the weights, and that nothing but rounding is lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import blockwise
from recjax.core.errors import ConfigError

LEVELS = np.asarray(blockwise._LEVELS, np.float32)
# The most that an entry is moved, as a part of its block's largest: half a step of 127, half the widest gap.
WORST = {"int8": 0.5 / 127, "nf4": np.diff(LEVELS).max() / 2}


def weight(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape) * 0.3


@pytest.mark.parametrize("kind", blockwise.KINDS)
@pytest.mark.parametrize("shape", [(48,), (3, 128), (2, 5, 4, 24)])
def test_no_entry_moves_further_than_half_a_step(kind: str, shape: tuple[int, ...]) -> None:
    w = weight(*shape)
    stored = blockwise.store(w, kind, 64)
    size = blockwise.block_of(shape[-1], 64)
    largest = np.abs(np.asarray(w)).reshape(*shape[:-1], -1, size).max(-1)
    np.testing.assert_allclose(stored[blockwise.SCALES], largest)
    moved = np.abs(np.asarray(blockwise.read(stored) - w)).reshape(*largest.shape, size)
    assert (moved <= largest[..., None] * WORST[kind] + 1e-7).all()
    assert blockwise.bytes_of(shape, kind, 64) == sum(x.nbytes for x in stored.values())


@pytest.mark.parametrize("kind", blockwise.KINDS)
def test_storing_again_changes_nothing(kind: str) -> None:
    once = blockwise.read(blockwise.store(weight(4, 96), kind, 32))
    np.testing.assert_allclose(blockwise.read(blockwise.store(once, kind, 32)), once, rtol=1e-6)


def test_nf4_takes_the_nearest_level() -> None:
    w = np.asarray(weight(7, 64))
    scale = np.abs(w).max(-1, keepdims=True)
    nearest = LEVELS[np.abs(w[..., None] / scale[..., None] - LEVELS).argmin(-1)] * scale
    np.testing.assert_allclose(blockwise.read(blockwise.store(jnp.asarray(w), "nf4", 64)), nearest, rtol=1e-6)


@pytest.mark.parametrize("kind", blockwise.KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    assert not np.asarray(blockwise.read(blockwise.store(jnp.zeros((3, 8)), kind, 4))).any()


def test_a_layer_of_a_stack_is_stored_as_by_itself() -> None:
    w = weight(3, 8, 32)
    stored = blockwise.store(w, "nf4", 16)
    second = blockwise.read(jax.tree.map(lambda x: x[1], stored))
    np.testing.assert_array_equal(second, blockwise.read(blockwise.store(w[1], "nf4", 16)))


def test_what_cannot_be_stored() -> None:
    with pytest.raises(ConfigError, match="even"):
        blockwise.store(weight(2, 3), "nf4", 64)
    with pytest.raises(ConfigError, match="int4"):
        blockwise.store(weight(2, 4), "int4", 64)
