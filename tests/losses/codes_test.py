"""The loss of a residual quantiser and where its gradients go, and where they do not."""

import jax
import jax.numpy as jnp
import numpy as np

from recjax.losses.codes import ResidualQuantization
from recjax.nn.quantize import quantize

N, LEVELS, SIZE, WIDTH = 7, 3, 5, 4
KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


Z, BOOKS = normal(N, WIDTH), normal(LEVELS, SIZE, WIDTH, seed=1)
WEIGHT = jnp.asarray([1.0, 1, 0, 1, 2, 1, 1])


def loss(z: jax.Array, books: jax.Array, **scales: float) -> jax.Array:
    """Without reconstruction unless asked: content and what is made of it are both zero."""
    found = quantize(z, books)
    zero = jnp.zeros((N, 2))
    out = {"content": zero, "reconstruction": zero, "residuals": found.inputs, "chosen": found.chosen}
    total, _, _ = ResidualQuantization(**scales)(out, {"weight": WEIGHT}, {}, KEY)
    return total


def cumulative() -> tuple[np.ndarray, np.ndarray]:
    """What was chosen at each level, and its sums up to each level."""
    chosen = np.asarray(quantize(Z, BOOKS).chosen)
    return chosen, chosen.cumsum(1)


def test_it_is_the_formula() -> None:
    chosen, sums = cumulative()
    x, made = np.asarray(normal(N, 6, seed=2)), np.asarray(normal(N, 6, seed=3))
    left = np.asarray(Z)[:, None] - np.concatenate([np.zeros((N, 1, WIDTH)), sums[:, :-1]], axis=1)
    squares = ((left - chosen) ** 2).sum((1, 2))
    want = (np.asarray(WEIGHT) * (((x - made) ** 2).sum(1) + 2.0 * squares + 0.5 * squares)).sum()
    out = {"content": x, "reconstruction": made, "residuals": left.astype(np.float32), "chosen": chosen}
    objective = ResidualQuantization(codebook=2.0, commitment=0.5)
    got = objective({k: jnp.asarray(v) for k, v in out.items()}, {"weight": WEIGHT}, {}, KEY)
    np.testing.assert_allclose(got.total, want, rtol=1e-5)
    assert float(got.weight) == 7 == float(objective.total_weight({"weight": WEIGHT}))
    assert set(got.metrics) == {"reconstruction", "codebook", "commitment"}
    np.testing.assert_allclose(got.metrics["commitment"][0], (np.asarray(WEIGHT) * squares).sum(), rtol=1e-5)


def test_every_level_commits_the_encoder() -> None:
    """2 beta sum_l (z - sum_{j<=l} e_j), and nothing of it reaches a book."""
    _, sums = cumulative()
    for_z, for_books = jax.grad(loss, argnums=(0, 1))(Z, BOOKS, codebook=0.0, commitment=0.25)
    want = 2 * 0.25 * (np.asarray(Z)[:, None] - sums).sum(1) * np.asarray(WEIGHT)[:, None]
    np.testing.assert_allclose(for_z, want, rtol=1e-4, atol=1e-5)
    assert not np.asarray(for_books).any()


def test_the_codebook_part_moves_each_chosen_row_towards_what_it_was_given() -> None:
    """and nothing of it reaches the encoder."""
    for_z, for_books = jax.grad(loss, argnums=(0, 1))(Z, BOOKS, codebook=1.0, commitment=0.0)
    assert not np.asarray(for_z).any()
    found = quantize(Z, BOOKS)
    want = np.zeros(BOOKS.shape, np.float32)
    for item in range(N):
        for level in range(LEVELS):
            code = int(found.codes[item, level])
            want[level, code] += 2 * float(WEIGHT[item]) * np.asarray(found.chosen - found.inputs)[item, level]
    np.testing.assert_allclose(for_books, want, rtol=1e-4, atol=1e-5)
