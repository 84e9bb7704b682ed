"""AUC and its kin equal brute force, and their values by user have the mean and the spread of the metric."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.metrics.auc import (
    auc,
    auc_by_user,
    grouped_auc,
    grouped_auc_by_user,
    grouped_aucs_by_user,
    log_losses,
    ratio_by_user,
)
from recjax.metrics.bootstrap import interval


def brute_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    return float(np.mean(pairs)) if pairs else float("nan")


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    users = draw(st.integers(1, 5))
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    # few different scores, so that there are ties
    return rng.integers(0, 6, count) / 2.0, rng.random(count) < 0.4, rng.integers(0, users, count), users


@given(answers())
def test_auc_and_grouped_auc_by_brute_force(case) -> None:
    scores, positive, user, users = case
    np.testing.assert_allclose(auc(scores, positive), brute_auc(scores, positive), atol=1e-12)
    each = np.array([brute_auc(scores[user == u], positive[user == u]) for u in range(users)])
    want = np.nanmean(each) if np.isfinite(each).any() else np.nan
    np.testing.assert_allclose(grouped_auc(scores, positive, user, users), want, atol=1e-12)
    known, rows = np.isfinite(each), np.bincount(user, minlength=users)
    want = np.average(each[known], weights=rows[known]) if known.any() else np.nan
    got = grouped_aucs_by_user(scores, positive, user, users)[1].mean()
    np.testing.assert_allclose(got, want, atol=1e-12)
    _, gauc = grouped_aucs_by_user(scores, positive, user * 0, 1)
    np.testing.assert_allclose(gauc, auc(scores, positive))


@given(answers())
def test_the_mean_over_users_is_the_metric(case) -> None:
    scores, positive, user, users = case
    values = auc_by_user(scores, positive, user, users)
    assert values.shape == (users,)
    np.testing.assert_allclose(values.mean(), auc(scores, positive), atol=1e-12)
    total, weight = np.bincount(user, scores, minlength=users), np.bincount(user, minlength=users).astype(float)
    np.testing.assert_allclose(ratio_by_user(total, weight).mean(), scores.mean(), atol=1e-12)


@given(answers(), st.floats(0.1, 10), st.floats(-5, 5))
def test_auc_knows_order_alone(case, slope: float, shift: float) -> None:
    scores, positive, user, users = case
    moved = np.exp(scores) * slope + shift
    np.testing.assert_allclose(auc(moved, positive), auc(scores, positive), atol=1e-12)
    turned = 1 - auc(-scores, positive)
    np.testing.assert_allclose(turned, auc(scores, positive), atol=1e-12)
    one, other = (grouped_auc(s, positive, user, users) for s in (scores, moved))
    np.testing.assert_allclose(one, other, atol=1e-12)


def test_the_spread_over_users_is_that_of_the_metric() -> None:
    """The interval of the values by user is that of drawing users and taking the metric anew."""
    rng = np.random.default_rng(0)
    users, draws = 150, 400
    many = rng.integers(2, 12, users)
    user = np.repeat(np.arange(users), many)
    taste = rng.normal(size=users)[user]  # what the answers of a user have in common
    scores = taste + rng.normal(size=len(user))
    positive = scores + 0.8 * taste + rng.normal(size=len(user)) > 0.5
    losses = log_losses(np.stack([np.zeros_like(scores), scores], axis=1), positive.astype(int))
    metrics = {
        "auc": (auc_by_user(scores, positive, user, users), lambda at, _: auc(scores[at], positive[at])),
        "grouped": (
            grouped_auc_by_user(scores, positive, user, users),
            lambda at, who: grouped_auc(scores[at], positive[at], who, users),
        ),
        "log loss": (ratio_by_user(np.bincount(user, losses), many.astype(float)), lambda at, _: losses[at].mean()),
    }
    drawn = rng.integers(0, users, (draws, users))
    rows = [np.flatnonzero(user == u) for u in range(users)]
    parts = [[rows[u] for u in row] for row in drawn.tolist()]
    again = [(np.concatenate(p), np.repeat(np.arange(users), [len(x) for x in p])) for p in parts]
    for values, metric in metrics.values():
        found = interval(values, samples=2000)
        low, high = np.quantile([metric(*a) for a in again], [0.025, 0.975])
        np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.15 * (high - low))


def test_log_losses_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(20, 4)).astype(np.float32) * 5, rng.integers(0, 4, 20)
    p = np.exp(logits.astype(float))
    want = -np.log(p[np.arange(20), labels] / p.sum(axis=1))
    np.testing.assert_allclose(log_losses(logits, labels), want, rtol=1e-10)
    assert np.isfinite(log_losses(np.array([[1e4, -1e4]]), np.array([1]))).all()


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_alone_has_no_auc(kind: bool) -> None:
    positive, user = np.full(4, kind), np.array([0, 0, 1, 1])
    assert np.isnan(auc(np.arange(4.0), positive))
    assert np.isnan(auc_by_user(np.arange(4.0), positive, user, 2)).all()
    assert np.isnan(grouped_auc(np.arange(4.0), positive, user, 2))
