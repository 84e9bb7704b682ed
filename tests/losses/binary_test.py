"""Binary losses against a transcription of their papers' formulas, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.losses.binary import GBCE, BinaryCrossEntropy, binary_cross_entropy
from recjax.losses.sampled import Scores

B, L, N = 3, 4, 5
VALID = jnp.asarray((np.arange(64) >= 2) & (np.arange(64) < 52))
ITEMS = jnp.int32(50)


def _scores() -> Scores:
    draw = np.random.default_rng(1)
    target, negative, hit = draw.normal(size=(B, L)), draw.normal(size=(B, L, N)), draw.random((B, L, N)) < 0.3
    return Scores(jnp.float32(target), jnp.float32(negative), jnp.asarray(hit), jnp.zeros((1, 1, N)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize("t", [0.0, 0.5, 0.75, 1.0])
def test_gbce_equals_its_formula(t: float) -> None:
    scores = _scores()
    got = GBCE(num_negatives=N, t=t).position_loss(scores, ITEMS)
    alpha = N / (50 - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    positive = np.log(_sigmoid(scores.target) ** beta)
    negative = np.where(scores.hit, 0, np.log(1 - _sigmoid(scores.negative))).sum(-1)
    np.testing.assert_allclose(got, -(positive + negative) / (1 + N), rtol=1e-5)


def test_gbce_of_t_zero_is_binary_cross_entropy() -> None:
    scores = _scores()
    want = BinaryCrossEntropy(num_negatives=N).position_loss(scores, ITEMS)
    np.testing.assert_allclose(GBCE(num_negatives=N, t=0.0).position_loss(scores, ITEMS), want, rtol=1e-6)
    np.testing.assert_allclose(binary_cross_entropy(scores), want)


def test_large_logits_stay_finite() -> None:
    scores = Scores(jnp.full((1, 1), -1e4), jnp.full((1, 1, 2), 1e4), jnp.zeros((1, 1, 2), bool), jnp.zeros((1, 1, 2)))
    value, gradient = jax.value_and_grad(lambda s: binary_cross_entropy(s, 0.3).sum(), allow_int=True)(scores)
    assert np.isfinite(value) and np.isfinite(gradient.target).all() and np.isfinite(gradient.negative).all()


@pytest.mark.parametrize("objective", [BinaryCrossEntropy(), GBCE(num_negatives=8)], ids=["bce", "gbce"])
def test_objective_draws_items_and_weighs_positions(objective) -> None:
    draw = np.random.default_rng(0)
    out = {"hidden": jnp.float32(draw.normal(size=(2, L, 4))), "table": jnp.float32(draw.normal(size=(64, 4)))}
    weight = jnp.asarray([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    batch = {"target_ids": jnp.where(weight > 0, 20, 0).astype(jnp.int32), "weight": weight}
    const = {"item_valid": VALID, "item_count": jnp.ones(64)}

    def total(out):
        return objective(out, batch, const, jax.random.key(0)).total

    value, gradient = jax.jit(jax.value_and_grad(total))(out)
    assert float(value) > 0 and objective(out, batch, const, jax.random.key(0)).weight == 2
    assert not np.asarray(gradient["hidden"])[np.asarray(weight) == 0].any()
    moved = np.asarray(gradient["table"]).any(-1)
    assert moved[20] and not moved[~np.asarray(VALID)].any()
