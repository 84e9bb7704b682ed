"""A shift of logits that makes the sums of groups what they are known to be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recjax.metrics.group_shift import group_shifts, shift_by_user


def sums(logits: np.ndarray, group: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    return np.asarray([(weight / (1 + np.exp(-logits)))[group == g].sum() for g in range(count)])


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 20.0]))
def test_sums_of_groups_become_their_totals(seed: int, spread: float) -> None:
    draw = np.random.default_rng(seed)
    logits, group, weight = draw.normal(size=200) * spread, draw.integers(0, 4, 200), draw.random(200) + 0.1
    totals = np.asarray([weight[group == g].sum() for g in range(4)]) * draw.uniform(0.001, 0.999, 4)
    shift = group_shifts(logits, group, totals, weight)
    np.testing.assert_allclose(sums(logits + shift[group], group, weight, 4), totals, atol=1e-4)


def test_a_right_group_is_left_alone_and_order_within_a_group_is_kept() -> None:
    logits, group = np.asarray([0.5, -1.0, 2.0, 0.0]), np.asarray([0, 0, 1, 1])
    right = sums(logits, group, np.ones(4), 2)
    np.testing.assert_allclose(group_shifts(logits, group, right), 0, atol=1e-9)


def test_totals_that_cannot_be_reached_and_groups_without_rows() -> None:
    shift = group_shifts(np.zeros(3), np.asarray([0, 1, 1]), np.asarray([0.0, 2.0, 1.0]))
    np.testing.assert_array_equal(shift, [-np.inf, np.inf, 0])


def test_the_shift_of_a_group_is_a_mean_over_users_that_says_what_a_user_is_worth() -> None:
    draw = np.random.default_rng(3)
    logits, user = draw.normal(size=4000), np.sort(draw.integers(0, 200, 4000))
    label = (draw.random(4000) < 1 / (1 + np.exp(-(logits + 0.7)))).astype(np.float64)

    def shift(rows: np.ndarray) -> float:
        return float(group_shifts(logits[rows], np.zeros(rows.sum(), np.int64), np.asarray([label[rows].sum()]))[0])

    found, whole = shift_by_user(logits, label, user, 200), shift(user >= 0)
    assert np.isclose(found.mean(), whole) and abs(whole - 0.7) < 0.15
    for gone in range(0, 200, 20):  # without the user the shift is what the others have, to first order
        others = np.delete(found, gone).mean()
        assert abs(others - shift(user != gone)) < 0.05 * abs(found[gone] - whole) / 200 + 1e-4
    assert np.isnan(shift_by_user(logits[:5], np.ones(5), user[:5], 3)).all()
