"""Lookups: padding is the zero vector and learns nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from recjax.nn.embed import lookup, lookup_and_pass

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
IDS = jnp.asarray([[0, 2, 5], [2, 0, 0]], jnp.int32)


def test_rows_by_id_and_zero_for_padding() -> None:
    got = np.asarray(lookup(TABLE, IDS))
    for place, row in np.ndenumerate(np.asarray(IDS)):
        np.testing.assert_array_equal(got[place], TABLE[row] if row else np.zeros(3))


def test_gradient_adds_up_repeats_and_leaves_padding_alone() -> None:
    weights = jnp.arange(18, dtype=jnp.float32).reshape(2, 3, 3)
    got = jax.grad(lambda t: (lookup(t, IDS) * weights).sum())(TABLE)
    want = np.zeros((6, 3), np.float32)
    for place, row in np.ndenumerate(np.asarray(IDS)):
        if row:
            want[row] += weights[place]
    np.testing.assert_allclose(got, want)


def test_table_handed_on_collects_both_gradients() -> None:
    def handed_on(table: jax.Array) -> jax.Array:
        rows, table = lookup_and_pass(table, IDS)
        return rows.sum() + (2 * table).sum()

    np.testing.assert_allclose(
        jax.grad(handed_on)(TABLE), jax.grad(lambda t: lookup(t, IDS).sum() + (2 * t).sum())(TABLE)
    )
