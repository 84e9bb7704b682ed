"""IsoFLOP curves find the planted optimum, and say when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.study.curves import allocation, isoflop

SIZES = np.geomspace(1e4, 1e6, 6)


def losses(best: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    exact = 4.0 + 0.05 * np.log(SIZES / best) ** 2
    return exact + noise * np.random.default_rng(seed).standard_normal(len(SIZES))


def test_the_lowest_point_is_the_planted_one() -> None:
    curve = isoflop(1e15, SIZES, 1e15 / (6 * SIZES), losses(7e4))
    assert curve.is_inside
    assert curve.best_parameters == pytest.approx(7e4, rel=1e-6)
    assert curve.best_targets == pytest.approx(1e15 / (6 * 7e4), rel=1e-6)
    assert curve.best_loss == pytest.approx(4.0)
    np.testing.assert_allclose(curve.predict(SIZES), losses(7e4))


@pytest.mark.parametrize("best", [1e2, 1e8])
def test_an_optimum_beyond_the_sizes_is_none(best: float) -> None:
    curve = isoflop(1e15, SIZES, 1e15 / (6 * SIZES), losses(best))
    assert not curve.is_inside
    assert curve.best_parameters == pytest.approx(SIZES[0] if best < SIZES[0] else SIZES[-1])
    assert allocation([curve, curve]) is None


def test_a_curve_that_bends_the_other_way_has_no_optimum_inside() -> None:
    curve = isoflop(1e15, SIZES, 1e15 / (6 * SIZES), 8.0 - losses(1e5))
    assert not curve.is_inside


def test_the_exponents_are_the_planted_ones() -> None:
    budgets = np.geomspace(1e13, 1e15, 4)
    best = [1e5 * (c / 1e14) ** 0.4 for c in budgets]
    exact = [isoflop(c, SIZES, c / (6 * SIZES), losses(n)) for c, n in zip(budgets, best, strict=True)]
    found = allocation(exact)
    assert found is not None and found.budgets == 4
    assert found.p == pytest.approx(0.4) and found.q == pytest.approx(0.6)
    noisy = [
        isoflop(c, SIZES, c / (6 * SIZES), losses(n, 0.01, i))
        for i, (c, n) in enumerate(zip(budgets, best, strict=True))
    ]
    found = allocation(noisy, samples=300)
    assert found is not None and found.p_interval[0] < 0.4 < found.p_interval[1]
    assert found.p_interval[0] < found.p < found.p_interval[1]


def test_two_sizes_are_no_curve() -> None:
    with pytest.raises(ConfigError, match="a parabola through 2 sizes"):
        isoflop(1e15, [1e4, 1e5], [1e10, 1e9], [4.0, 4.1])
