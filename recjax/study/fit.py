"""Robust fits of the laws, and how far they could be off.

The objective is the sum of Huber losses (delta 1e-3) of the residuals of log loss (Hoffmann et al. 2022, appendix
D.3), minimised from every start of the law's grid: a few damped Gauss-Newton steps each, then L-BFGS from the most
promising; the best is kept. Intervals come from a parametric bootstrap over runs: new losses are drawn around the fit,
normal in log loss with the scale of its residuals, which is itself uncertain (n - p degrees of freedom), and fitted
again. A few sizes do not bear a resampling of the runs themselves: most draws would hold too few different ones. All
refits go side by side in one damped Gauss-Newton iteration, so that a thousand cost less than a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import optimize

from recjax.core.errors import ConfigError
from recjax.study.laws import Law

DELTA = 1e-3
COVERAGE = 0.9
_STEP = 1e-5
_FINALISTS = 2
_FLAT = 1e-2  # an asymptote below this share of the smallest loss is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with its parameters `theta` [p] for inputs `x` [n, i] and losses `loss` [n]."""

    law: Law
    x: np.ndarray
    loss: np.ndarray
    centre: np.ndarray
    theta: np.ndarray
    cost: float

    def predict(self, x: Any) -> np.ndarray:
        """Losses at inputs [m, i]."""
        return np.exp(self.law.log_loss(self.theta, self.law.place(_inputs(self.law, x), self.centre)))

    @property
    def residuals(self) -> np.ndarray:
        """log loss - log of the fit, [n]."""
        return np.log(self.loss) - np.log(self.predict(self.x))

    @property
    def values(self) -> dict[str, float]:
        """The parameters of the formula."""
        return {name: float(value) for name, value in self.law.values(self.theta, self.centre).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Refits: `theta` [samples, p], and the scale of log loss around each, [samples]."""

    fit: Fit
    theta: np.ndarray
    scale: np.ndarray
    noise: np.ndarray

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Central 90% of every parameter."""
        values = self.fit.law.values(self.theta, self.fit.centre)
        return {name: _central(value) for name, value in values.items()}

    def curve(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Central 90% of the law itself at inputs [m, i]: low [m], high [m]."""
        return _bounds(np.exp(self._log_loss(x)))

    def prediction(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Central 90% of a new measurement at inputs [m, i], which scatters as the runs do."""
        return _bounds(np.exp(self._log_loss(x) + (self.scale * self.noise)[:, None]))

    def has_floor(self) -> bool:
        """Whether the asymptote E is told apart from 0; if not, only its interval means anything."""
        low = self.intervals().get("E", (0.0, 0.0))[0]
        return low > _FLAT * float(self.fit.loss.min())

    def _log_loss(self, x: Any) -> np.ndarray:
        law = self.fit.law
        return law.log_loss(self.theta, law.place(_inputs(law, x), self.fit.centre))


def fit(law: Law, x: Any, loss: Any) -> Fit:
    """The best of L-BFGS from all starts, for inputs [n, i] (or [n] for one input) and losses [n] in nats.

    Raises `ConfigError` for fewer different inputs than the law has parameters.
    """
    x, loss = _inputs(law, x), np.asarray(loss, float)
    distinct = len(np.unique(x, axis=0))
    if distinct < law.parameters:
        raise ConfigError(
            f"the law {law.formula} has {law.parameters} parameters and {distinct} different points",
            expected=f"at least {law.parameters} points",
            mend="train more cells, or fit another law",
        )
    if not (np.isfinite(loss).all() and (loss > 0).all()):
        raise ConfigError("losses must be positive numbers", where=str(loss.tolist()))
    centre = law.centre(x)
    z, log_loss = law.place(x, centre), np.log(loss)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        residual = law.log_loss(theta, z) - log_loss
        slope = np.clip(residual, -DELTA, DELTA)
        jacobian = _jacobian(law, theta[None], z)[0]
        return float(_huber(residual)), (slope[:, None] * jacobian).sum(axis=0) / DELTA**2

    starts = law.starts(z, loss)
    starts, costs = _refine(law, starts, z, np.tile(log_loss, (len(starts), 1)), steps=30)
    found = [
        optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 30, "ftol": 1e-8})
        for start in starts[np.argsort(costs, kind="stable")[:_FINALISTS]]
    ]
    best = min(found, key=lambda one: one.fun)
    theta, cost = _refine(law, best.x[None], z, log_loss[None])
    return Fit(law=law, x=x, loss=loss, centre=centre, theta=theta[0], cost=float(cost[0]))


def bootstrap(found: Fit, *, samples: int = 1000, seed: int = 0) -> Bootstrap:
    """Refits to losses drawn around `found`; raises `ConfigError` where a law goes through all of its points."""
    law, rng = found.law, np.random.default_rng(seed)
    if len(np.unique(found.x, axis=0)) <= law.parameters:
        raise ConfigError(
            f"{law.formula} goes through all {len(found.loss)} points, and nothing is left to tell how far it is off",
            expected=f"more than {law.parameters} different points",
        )
    z = law.place(found.x, found.centre)
    residuals = found.residuals
    n = len(residuals)
    freedom = n - law.parameters
    spread = np.sqrt(np.square(residuals).sum() / freedom)
    scale = spread * np.sqrt(freedom / rng.chisquare(freedom, samples))
    drawn = rng.standard_normal((samples, n + 1))
    log_loss = np.log(found.predict(found.x)) + scale[:, None] * drawn[:, :n]
    theta, cost = _refine(law, np.tile(found.theta, (samples, 1)), z, log_loss)
    if "E" in law.values(found.theta, found.centre):  # from the other side, where the asymptote counts for something
        other = np.tile(_raised(found), (samples, 1))
        other, other_cost = _refine(law, other, z, log_loss)
        is_better = other_cost < cost
        theta = np.where(is_better[:, None], other, theta)
    return Bootstrap(fit=found, theta=theta, scale=scale, noise=drawn[:, n])


def stated(found: Bootstrap) -> dict[str, dict[str, Any]]:
    """Every parameter as it may be quoted: value and interval, the value of an E that is not identifiable left out."""
    values: Mapping[str, float] = found.fit.values
    out: dict[str, dict[str, Any]] = {}
    for name, (low, high) in found.intervals().items():
        is_known = name != "E" or found.has_floor()
        out[name] = {"value": values[name] if is_known else None, "low": low, "high": high}
    return out


def _raised(found: Fit) -> np.ndarray:
    """Parameters with an asymptote of four fifths of the smallest loss, the rest shifted to go through the middle."""
    theta, floor = found.theta.copy(), 0.8 * found.loss.min()
    theta[0], theta[1] = np.log(floor), np.log(np.median(found.loss) - floor)
    return theta


def _huber(residual: np.ndarray) -> Any:
    """Sum over the last axis, in units of delta^2."""
    size = np.abs(residual) / DELTA
    return np.where(size <= 1, 0.5 * size**2, size - 0.5).sum(axis=-1)


def _jacobian(law: Law, theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    """[b, n, p] by central differences."""
    ends = [theta[:, None] + sign * _STEP * np.eye(theta.shape[1]) for sign in (1, -1)]
    up, down = (law.log_loss(end, z) for end in ends)
    return np.moveaxis(up - down, 1, 2) / (2 * _STEP)


def _refine(
    law: Law, theta: np.ndarray, z: np.ndarray, log_loss: np.ndarray, steps: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Damped Gauss-Newton on the reweighted squares, for all rows of `theta` [b, p] at once; never gets worse."""
    residual = law.log_loss(theta, z) - log_loss
    cost, damping = _huber(residual), np.full(len(theta), 1e-3)
    for _ in range(steps):
        jacobian = _jacobian(law, theta, z)
        weighted = jacobian * np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))[:, :, None]
        curvature = np.einsum("bnp,bnq->bpq", weighted, jacobian)
        slope = np.einsum("bnp,bn->bp", weighted, residual)
        diagonal = np.einsum("bpp->bp", curvature)
        damped = diagonal * damping[:, None] + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-300
        curvature = curvature + damped[:, :, None] * np.eye(theta.shape[1])
        change = np.clip(_solve(curvature, -slope), -1.0, 1.0)
        tried = theta + change
        new_residual = law.log_loss(tried, z) - log_loss
        new_cost = _huber(new_residual)
        is_better = new_cost < cost
        theta = np.where(is_better[:, None], tried, theta)
        residual = np.where(is_better[:, None], new_residual, residual)
        cost = np.where(is_better, new_cost, cost)
        damping = np.clip(np.where(is_better, damping / 3, damping * 4), 1e-9, 1e6)
    return theta, cost


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """x [b, p] of matrix [b, p, p] x = right [b, p], positive definite; small systems side by side, without BLAS.

    A threaded BLAS spends many times longer on waking its threads for systems of this size than on solving them.
    """
    rows = np.concatenate([matrix, right[:, :, None]], axis=2)
    for at in range(right.shape[1]):
        pivot = rows[:, at] / rows[:, at, at, None]
        rows = rows - rows[:, :, at, None] * pivot[:, None]
        rows[:, at] = pivot
    return rows[:, :, -1]


def _inputs(law: Law, x: Any) -> np.ndarray:
    x = np.asarray(x, float)
    return x.reshape(-1, len(law.inputs)) if x.ndim < 2 else x


def _central(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _bounds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return low, high
