"""The kernels of megablox, interpreted, against a loop over groups, and the gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.nn.megablox import megablox_product

N, D, F = 200, 24, 40


def by_loop(x: jax.Array, weights: jax.Array, sizes: list[int]) -> jax.Array:
    ends = np.cumsum([0, *sizes])
    parts = [x[a:b] @ w for a, b, w in zip(ends, ends[1:], weights, strict=False)]
    return jnp.concatenate([*parts, jnp.zeros((len(x) - ends[-1], weights.shape[2]))])


@pytest.mark.parametrize("sizes", [[70, 0, 130], [3, 5, 90], [0, 0, 0]], ids=["all", "some", "none"])
def test_a_loop_over_groups_gives_the_same(sizes: list[int]) -> None:
    draw = np.random.default_rng(0)
    x, weights, g = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((N, D), (3, D, F), (N, F)))
    got, back = jax.vjp(lambda x, w: megablox_product(x, w, jnp.asarray(sizes, jnp.int32), interpret=True), x, weights)
    want, back_by_loop = jax.vjp(lambda x, w: by_loop(x, w, sizes), x, weights)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(back(g), back_by_loop(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
