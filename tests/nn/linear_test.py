"""Products whose factors are rounded: what is rounded, and that gradients are those of a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.nn.linear import linear


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize("outputs", [7, 16])  # one that divides into blocks and one that does not
def test_factors_are_rounded_and_sums_are_not(shape: tuple[int, ...], outputs: int) -> None:
    draw = np.random.default_rng(0)
    x, w, b, g = (np.float32(draw.normal(size=s)) for s in (shape, (5, outputs), (outputs,), (*shape[:-1], outputs)))

    def dot(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return (linear(x, w, b, rounded=True) * g).sum()

    y = linear(*map(jnp.asarray, (x, w, b)), rounded=True)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded(x) @ rounded(w) + b, rtol=1e-5, atol=1e-5)
    d_x, d_w, d_b = jax.jit(jax.grad(dot, argnums=(0, 1, 2)))(*map(jnp.asarray, (x, w, b)))
    rows, sums = x.reshape(-1, 5), g.reshape(-1, outputs)
    np.testing.assert_allclose(d_x, rounded(g) @ rounded(w).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w, rounded(rows).T @ rounded(sums), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_b, sums.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [8, 300])  # one on either side of where the gradient is computed in another way
def test_exact_products_have_exact_gradients(inputs: int) -> None:
    draw = np.random.default_rng(0)
    x, w, g = (np.float32(draw.normal(size=s)) for s in ((2, 3, inputs), (inputs, 4), (2, 3, 4)))
    gradients = jax.jit(jax.grad(lambda x, w: (linear(x, w, None) * g).sum(), argnums=(0, 1)))
    d_x, d_w = gradients(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_allclose(d_x, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w, x.reshape(-1, inputs).T @ g.reshape(-1, 4), rtol=1e-5, atol=1e-5)
