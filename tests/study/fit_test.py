"""The fits recover what was planted, and their intervals hold it as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.study import laws
from recjax.study.fit import bootstrap, fit, stated

SIZES = np.geomspace(1e3, 1e8, 12)


def planted(law: laws.Law, x: np.ndarray, theta: tuple[float, ...], noise: float, seed: int) -> np.ndarray:
    """Losses of a law whose parameters are given for uncentred logarithms, with relative noise."""
    z = law.place(x, np.zeros(x.shape[1]))
    exact = np.exp(law.log_loss(np.array(theta), z))
    return exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x)))


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_power_law_is_recovered(seed: int) -> None:
    floor, scale, exponent = 3.0, 60.0, 0.3
    n = np.repeat(SIZES, 5)
    noise = 0.002 * np.random.default_rng(seed).standard_normal(len(n))
    found = fit(laws.POWER, n, (floor + scale / n**exponent) * np.exp(noise)).values
    assert found["E"] == pytest.approx(floor, rel=0.02)
    assert found["a"] == pytest.approx(exponent, rel=0.02)
    assert found["log10_N0"] * found["a"] == pytest.approx(np.log10(scale), rel=0.02)
    assert 10 ** (found["log10_N0"] * found["a"]) == pytest.approx(scale, rel=0.04)


def test_without_noise_every_law_is_recovered_exactly() -> None:
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(3e3, 3e6, 6), np.geomspace(1e5, 1e8, 5)))
    both = np.stack([n, d], axis=1)
    repeats = np.stack([d, np.tile([0.0, 1.0, 3.0, 8.0, 20.0, 60.0], 5)], axis=1)
    cases = [
        (laws.PURE, n[:, None], (2.5, np.log(0.05)), {"a": 0.05}),
        (laws.POWER, n[:, None], (np.log(4.0), 3.0, np.log(0.3)), {"E": 4.0, "a": 0.3}),
        (laws.JOINT, both, (np.log(2.0), 4.0, 5.0, np.log(0.35), np.log(0.28)), {"E": 2.0, "a": 0.35, "b": 0.28}),
        (laws.KAPLAN, both, (15.0, 16.0, np.log(0.08), np.log(0.1)), {"aN": 0.08, "aD": 0.1}),
        (laws.REPETITION, repeats, (np.log(3.0), 4.0, np.log(0.3), np.log(6.0)), {"E": 3.0, "b": 0.3, "r": 6.0}),
    ]
    for law, x, theta, values in cases:
        found = fit(law, x, planted(law, x, theta, 0.0, 0))
        assert np.abs(found.residuals).max() < 1e-6, law.name
        for name, value in values.items():
            assert found.values[name] == pytest.approx(value, rel=1e-3), (law.name, name)


def test_one_wild_run_does_not_move_the_law() -> None:
    n = np.repeat(SIZES, 2)
    loss = 3.0 + 60.0 / n**0.3
    clean = fit(laws.POWER, n, loss).values
    loss[5] *= 1.3
    wild = fit(laws.POWER, n, loss).values
    assert wild["E"] == pytest.approx(clean["E"], rel=1e-3) and wild["a"] == pytest.approx(clean["a"], rel=1e-2)


def test_intervals_cover_what_was_planted() -> None:
    """Of the exponent, and of a new measurement ten times beyond the sizes that were fitted."""
    rng, held = np.random.default_rng(0), {"exponent": 0, "new": 0}
    n, repetitions = np.geomspace(3e3, 1e5, 7), 150

    def measured(size: np.ndarray) -> np.ndarray:
        return (40.0 / size**0.04) * np.exp(0.005 * rng.standard_normal(size.shape))

    for number in range(repetitions):
        draws = bootstrap(fit(laws.PURE, n, measured(n)), samples=100, seed=number)
        low, high = draws.intervals()["a"]
        held["exponent"] += low <= 0.04 <= high
        low, high = draws.prediction([1e6])
        held["new"] += bool(low[0] <= measured(np.array([1e6]))[0] <= high[0])
    assert held["exponent"] >= 0.85 * repetitions and held["new"] >= 0.85 * repetitions


def test_an_asymptote_that_the_sizes_do_not_show_has_no_value() -> None:
    n = np.geomspace(3e3, 1e5, 7)
    rng = np.random.default_rng(1)
    hidden = stated(bootstrap(fit(laws.POWER, n, 40.0 / n**0.04 * np.exp(0.003 * rng.standard_normal(7)))))
    assert hidden["E"]["value"] is None and hidden["E"]["low"] < 0.1 < hidden["E"]["high"]
    shown = stated(bootstrap(fit(laws.POWER, SIZES, (3.0 + 60 / SIZES**0.3) * np.exp(0.002 * rng.standard_normal(12)))))
    assert shown["E"]["low"] < shown["E"]["value"] < shown["E"]["high"]
    assert shown["E"]["value"] == pytest.approx(3.0, rel=0.05)


def test_a_refit_reaches_what_a_fit_from_all_starts_reaches() -> None:
    """The bootstrap's iteration, checked against the full search on the losses of one draw."""
    n = np.geomspace(3e3, 1e6, 8)
    loss = (2.0 + 30.0 / n**0.2) * np.exp(0.004 * np.random.default_rng(3).standard_normal(8))
    found = fit(laws.POWER, n, loss)
    again = fit(laws.POWER, n[::-1], loss[::-1])
    np.testing.assert_allclose(found.predict([1e7]), again.predict([1e7]), rtol=1e-6)
    draws = bootstrap(found, samples=40, seed=0)
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.square(found.residuals).sum() / 5) * np.sqrt(5 / rng.chisquare(5, 40))
    drawn = rng.standard_normal((40, 9))
    for row in range(3):
        same = fit(laws.POWER, n, found.predict(n) * np.exp(scale[row] * drawn[row, :8]))
        refit = np.exp(laws.POWER.log_loss(draws.theta[row], laws.POWER.place(n[:, None], found.centre)))
        np.testing.assert_allclose(refit, same.predict(n), rtol=2e-3)


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="3 parameters and 2 different points"):
        fit(laws.POWER, [1e3, 1e4, 1e4], [5.0, 4.0, 4.1])
    with pytest.raises(ConfigError, match="positive numbers"):
        fit(laws.PURE, [1e3, 1e4, 1e5], [5.0, 4.0, float("nan")])
    with pytest.raises(ConfigError, match="goes through all 2 points"):
        bootstrap(fit(laws.PURE, [1e3, 1e4], [5.0, 4.0]))


def test_what_repetitions_are_worth() -> None:
    unique, r = np.array(1000.0), 7.0
    assert laws.effective_targets(unique, np.array(0.0), r) == 1000
    assert laws.effective_targets(unique, np.array(1e6), r) == pytest.approx(1000 * (1 + r))
    few = laws.effective_targets(unique, np.array(0.01), r)
    assert few == pytest.approx(1000 * 1.01, rel=1e-4)  # the first repetitions are as good as new
    steps = np.diff(laws.effective_targets(unique, np.arange(10.0), r))
    assert (steps > 0).all() and (np.diff(steps) < 0).all()
