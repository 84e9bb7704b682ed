"""A calibration finds the temperature and bias that the answers were drawn with; its error equals brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.metrics.auc import auc, log_losses
from recjax.metrics.calibration import Calibration, calibration_error, deciles, fit_calibration, probabilities


@pytest.mark.parametrize("classes", [2, 4])
def test_it_finds_what_the_answers_were_drawn_with(classes: int) -> None:
    rng = np.random.default_rng(classes)
    true = Calibration(2.5, (0.0, *np.linspace(-0.7, 0.4, classes - 1)))
    logits = rng.normal(size=(40_000, classes)) * 3
    p = probabilities(true(logits))
    labels = (rng.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1)
    found = fit_calibration(logits, labels)
    np.testing.assert_allclose(found.temperature, true.temperature, rtol=0.05)
    np.testing.assert_allclose(found.bias, true.bias, atol=0.06)
    before, after = (
        calibration_error(probabilities(logits)[:, 1], labels == 1),
        calibration_error(probabilities(found(logits))[:, 1], labels == 1),
    )
    assert after < 0.02 < before


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_no_neighbour_is_better(seed: int, classes: int) -> None:
    """What is fitted is the minimum of the log loss."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(60, classes)), rng.integers(0, classes, 60)
    found = fit_calibration(logits, labels)
    least = log_losses(found(logits), labels).mean()
    if found.temperature < 900:
        for _ in range(10):
            slope = 1 / found.temperature + rng.normal() * 0.02
            other = Calibration(1 / slope, (0.0, *(np.array(found.bias[1:]) + rng.normal(size=classes - 1) * 0.02)))
            assert log_losses(other(logits), labels).mean() >= least - 1e-8


def test_order_stays_and_hard_cases_stay_finite() -> None:
    rng = np.random.default_rng(3)
    logits = np.stack([np.zeros(50), rng.normal(size=50)], axis=1)
    for labels in (logits[:, 1] > 0, logits[:, 1] < 0, np.ones(50, bool)):  # without error, turned round, one kind
        found = fit_calibration(logits, labels.astype(int))
        assert np.isfinite([found.temperature, *found.bias]).all() and found.temperature > 0
        if not labels.all():
            assert auc(found(logits)[:, 1], labels) == auc(logits[:, 1], labels)
    with pytest.raises(ValueError, match="nothing"):
        fit_calibration(logits[:0], np.zeros(0, int))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6))
def test_the_error_by_brute_force(seed: int, count: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    p, happened = rng.integers(0, 8, count) / 8.0, rng.random(count) < 0.5
    bin_of = [int((p < one).sum()) * bins // count for one in p]
    parts = [[i for i in range(count) if bin_of[i] == b] for b in range(bins)]
    want = sum(abs(np.mean(p[part]) - np.mean(happened[part])) * len(part) / count for part in parts if part)
    np.testing.assert_allclose(calibration_error(p, happened, bins=bins), want, atol=1e-12)


def test_a_constant_that_is_right_has_no_error() -> None:
    happened = np.arange(100) % 4 == 0
    assert calibration_error(np.full(100, 0.25), happened) == 0


def test_deciles_are_equally_large_and_in_order() -> None:
    p = np.random.default_rng(0).permutation(np.arange(1000) / 1000)
    assert (deciles(p) == (p * 10).astype(int)).all()
    assert np.unique(deciles(np.full(20, 0.5))).tolist() == [0]
