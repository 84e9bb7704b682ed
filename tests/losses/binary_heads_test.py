"""Losses of heads against plain loops; labels that are missing, rows of other domains, pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.losses.binary_heads import BinaryHead, PairwiseHead, ValueHead
from recjax.losses.objective import LossSum

Z = np.asarray([0.3, -1.2, 2.0, 0.1, -0.4])
Y = np.asarray([1, 0, np.nan, 0, 1])
UNKNOWN = [np.nan, -1.0]  # both say that a label is not known
WEIGHT = np.asarray([1, 2, 1, 0, 0.5])
DOMAIN = np.asarray([0, 1, 1, 0, 2])
USER = np.asarray([5, 5, 5, 6, 6])
KEY = jax.random.key(0)


def batch(**more: np.ndarray) -> dict[str, jax.Array]:
    data = {"label/click": Y, "weight": WEIGHT, "domain": DOMAIN, "user_index": USER} | more
    return {k: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32) for k, x in data.items()}


def found(objective: BinaryHead | ValueHead | PairwiseHead, z: np.ndarray = Z, **more: np.ndarray) -> LossSum:
    out, data = {f"logit/{objective.head}": jnp.float32(z)}, batch(**more)
    got = objective(out, data, {}, KEY)
    np.testing.assert_allclose(got.weight, objective.total_weight(data), rtol=1e-6)
    return got


@pytest.mark.parametrize("unknown", UNKNOWN)
@pytest.mark.parametrize("domains", [(), (1,), (0, 2)])
def test_cross_entropy_counts_rows_with_a_label_in_these_domains(domains: tuple[int, ...], unknown: float) -> None:
    told = {"label/click": np.where(np.isnan(Y), unknown, Y)}
    got = found(BinaryHead(name="click", head="click", domains=domains), **told)
    total = weight = predicted = positive = 0.0
    for z, y, w, d in zip(Z, Y, WEIGHT, DOMAIN, strict=True):
        if np.isnan(y) or (domains and d not in domains):
            continue
        p = 1 / (1 + np.exp(-z))
        total, weight = total - w * np.log(p if y else 1 - p), weight + w
        predicted, positive = predicted + w * p, positive + w * y
    np.testing.assert_allclose([got.total, got.weight], [total, weight], rtol=1e-5)
    np.testing.assert_allclose(got.metrics["calibration"], (predicted, positive), rtol=1e-5)


def test_a_missing_label_has_no_gradient() -> None:
    gradient = jax.grad(lambda z: BinaryHead(head="click")({"logit/click": z}, batch(), {}, KEY).total)(jnp.float32(Z))
    want = WEIGHT * (1 / (1 + np.exp(-Z)) - np.nan_to_num(Y))
    np.testing.assert_allclose(gradient, np.where(np.isnan(Y), 0, want), rtol=1e-5, atol=1e-7)


def test_large_logits_stay_finite() -> None:
    out = {"logit/click": jnp.float32([1e4, -1e4, 1e4, -1e4, 1e4])}
    value, gradient = jax.value_and_grad(lambda o: BinaryHead(head="click")(o, batch(), {}, KEY).total)(out)
    assert np.isfinite(value) and np.isfinite(gradient["logit/click"]).all()


def test_values_are_met_on_their_scale_and_as_rates() -> None:
    value = np.asarray([0, 3, np.nan, 1, 7.5])
    known = ~np.isnan(value)
    got = found(ValueHead(), **{"label/value": value}).total
    np.testing.assert_allclose(got, (WEIGHT * (Z - np.log1p(value)) ** 2)[known].sum(), rtol=1e-5)
    got = found(ValueHead(form="poisson"), **{"label/value": value}).total
    np.testing.assert_allclose(got, (WEIGHT * (np.exp(Z) - value * Z))[known].sum(), rtol=1e-5)


def test_pairs_are_of_one_user_and_of_different_labels() -> None:
    got, total, weight = found(PairwiseHead(head="click")), 0.0, 0.0
    for i in range(5):
        for j in range(5):
            if USER[i] == USER[j] and Y[i] > Y[j]:  # never true of a missing label
                w = WEIGHT[i] * WEIGHT[j]
                total, weight = total - w * np.log(1 / (1 + np.exp(Z[j] - Z[i]))), weight + w
    np.testing.assert_allclose([got.total, got.weight], [total, weight], rtol=1e-5)
    assert weight > 0
