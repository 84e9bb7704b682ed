"""Metrics of numbers against plain formulas, and that their linear forms move as they do."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.metrics.values import deviance_by_user, predicted_values, rmse_by_user

DRAW = np.random.default_rng(0)
N, USERS = 400, 40
USER = DRAW.integers(0, USERS, N)
VALUE = np.where(DRAW.random(N) < 0.3, 0.0, DRAW.gamma(2.0, 3.0, N))
OUTPUT = np.log1p(VALUE) + DRAW.normal(size=N) * 0.5


def plain(rows: np.ndarray) -> tuple[float, float]:
    y, m = VALUE[rows], np.maximum(np.expm1(OUTPUT[rows]), 0)
    rmse = np.sqrt(np.mean((np.log(1 + m) - np.log(1 + y)) ** 2))
    m = np.maximum(m, 1e-6)
    terms = [2 * ((a * np.log(a / b) if a > 0 else 0) - (a - b)) for a, b in zip(y, m, strict=True)]
    return float(rmse), float(np.mean(terms))


def test_means_over_users_are_the_metrics() -> None:
    predicted = predicted_values(OUTPUT, "log1p")
    found = [f(predicted, VALUE, USER, USERS) for f in (rmse_by_user, deviance_by_user)]
    np.testing.assert_allclose([f.mean() for f in found], plain(np.arange(N)), rtol=1e-9)


@pytest.mark.parametrize("gone", range(4))
def test_without_a_user_they_move_as_their_linear_form_says(gone: int) -> None:
    predicted = predicted_values(OUTPUT, "log1p")
    for at, f in enumerate((rmse_by_user, deviance_by_user)):
        by_user = f(predicted, VALUE, USER, USERS)
        moved = plain(np.flatnonzero(USER != gone))[at] - by_user.mean()
        told = np.delete(by_user, gone).mean() - by_user.mean()
        np.testing.assert_allclose(told, moved, atol=0.15 * np.abs(by_user - by_user.mean()).max() / USERS)


def test_a_rate_is_the_exponential_and_a_right_prediction_has_no_deviance() -> None:
    np.testing.assert_allclose(predicted_values(np.array([0.0, 1.0]), "poisson"), [1, np.e])
    exact = np.array([1.0, 5.0, 2.5])
    np.testing.assert_allclose(deviance_by_user(exact, exact, np.arange(3), 3), 0, atol=1e-12)
    np.testing.assert_array_equal(rmse_by_user(exact, exact, np.arange(3), 3), 0)


def test_without_rows_there_is_no_number() -> None:
    nothing = np.zeros(0)
    for f in (rmse_by_user, deviance_by_user):
        assert np.isnan(f(nothing, nothing, np.zeros(0, np.int64), 3)).all()
