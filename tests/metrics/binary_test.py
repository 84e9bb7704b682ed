"""Metrics of yes-or-no predictions against their definitions, and their values by user against the whole."""

import numpy as np
import pytest

from recjax.metrics.auc import auc
from recjax.metrics.binary import (
    binary_log_losses,
    calibration_by_user,
    corrected,
    domain_auc_by_user,
    normalised_entropy_by_user,
    sigmoid,
)


def rows(seed: int, n: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (with ties), labels and users."""
    rng = np.random.default_rng(seed)
    logit = np.round(rng.normal(-1, 1.5, n), 1)
    return logit, (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float), rng.integers(0, 40, n)


def test_log_losses_are_those_of_the_probability() -> None:
    logit, label, _ = rows(0)
    soft = np.random.default_rng(1).random(len(logit))
    p = 1 / (1 + np.exp(-logit))
    for y in (label, soft):
        np.testing.assert_allclose(binary_log_losses(logit, y), -y * np.log(p) - (1 - y) * np.log(1 - p), rtol=1e-12)
    np.testing.assert_allclose(sigmoid(logit), p, rtol=1e-12)
    far = np.array([-800.0, 800.0])
    assert binary_log_losses(far, np.array([1.0, 0.0])).tolist() == [800, 800] and sigmoid(far).tolist() == [0, 1]


def test_correction_gives_back_the_rate_before_negatives_were_left_out() -> None:
    rng = np.random.default_rng(0)
    for rate, keep in ((0.1, 0.25), (0.4, 0.1)):
        label = rng.random(400_000) < rate
        kept = label | (rng.random(len(label)) < keep)
        sampled = label[kept].mean()
        logit = np.array([np.log(sampled / (1 - sampled))])
        assert abs(sigmoid(corrected(logit, keep))[0] - label.mean()) < 0.01
        p = sampled
        np.testing.assert_allclose(sigmoid(corrected(logit, keep)), p / (p + (1 - p) / keep), rtol=1e-12)


def test_normalised_entropy_is_the_loss_over_that_of_the_rate() -> None:
    for seed in range(3):
        logit, label, user = rows(seed)
        loss, rate = binary_log_losses(logit, label), label.mean()
        entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
        assert np.isclose(normalised_entropy_by_user(loss, label, user, 40).mean(), loss.mean() / entropy)
        constant = binary_log_losses(np.full(len(label), np.log(rate / (1 - rate))), label)
        assert np.isclose(normalised_entropy_by_user(constant, label, user, 40).mean(), 1)
    assert np.isnan(normalised_entropy_by_user(loss, np.ones(len(loss)), user, 40)).all()


def test_calibration_is_said_over_happened() -> None:
    logit, label, user = rows(0)
    assert np.isclose(calibration_by_user(sigmoid(logit), label, user, 40).mean(), sigmoid(logit).sum() / label.sum())
    assert np.isnan(calibration_by_user(sigmoid(logit), np.zeros(len(label)), user, 40)).all()


def test_the_auc_of_domains_is_averaged_by_rows_and_plainly() -> None:
    logit, label, user = rows(0)
    domain = np.random.default_rng(2).choice(4, len(logit), p=[0.6, 0.25, 0.1, 0.05])
    label[domain == 3] = 1
    each = [auc(logit[domain == d], label[domain == d] > 0) for d in range(3)]
    sizes = [(domain == d).sum() for d in range(3)]
    weighted, plain = domain_auc_by_user(logit, label > 0, user, 40, domain)
    assert np.isclose(weighted.mean(), np.average(each, weights=sizes)) and np.isclose(plain.mean(), np.mean(each))
    one, _ = domain_auc_by_user(logit, label > 0, user, 40, np.zeros(len(logit), int))
    assert np.isclose(one.mean(), auc(logit, label > 0))
    assert np.isnan(domain_auc_by_user(logit, label > 2, user, 40, domain)[0]).all()


@pytest.mark.parametrize("metric", ["normalised_entropy", "calibration", "weighted_auc"])
def test_values_by_user_move_as_the_metric_does(metric: str) -> None:
    """Drawing a user once more moves the metric as its value says, to first order."""
    logit, label, user = rows(3, 4000)
    domain = user % 3

    def whole(times: np.ndarray) -> float:
        again = np.repeat(np.arange(len(user)), times[user])
        z, y, u, d = logit[again], label[again], user[again], domain[again]
        return float(by_user(z, y, u, d).mean())

    def by_user(z: np.ndarray, y: np.ndarray, u: np.ndarray, d: np.ndarray) -> np.ndarray:
        if metric == "normalised_entropy":
            return normalised_entropy_by_user(binary_log_losses(z, y), y, u, 40)
        if metric == "calibration":
            return calibration_by_user(sigmoid(z), y, u, 40)
        return domain_auc_by_user(z, y > 0, u, 40, d)[0]

    values, base = by_user(logit, label, user, domain), whole(np.ones(40, int))
    assert np.isclose(values.mean(), base)
    if metric != "weighted_auc":  # whose weights are taken as given
        for who in range(0, 40, 7):
            times = np.full(40, 50)
            times[who] += 1
            moved = (whole(times) - base) * 50 * 40
            assert abs(moved - (values[who] - base)) < 0.03 * max(1, abs(values[who] - base))
