"""IsoFLOP curves: for a given amount of training, which size is best, and how that changes with the amount.

For every budget C the losses of several sizes are fitted by a parabola in log N, whose lowest point is N_opt
(Hoffmann et al. 2022, section 3.2). What the budget buys at N_opt is D_opt, interpolated between the runs in the same
way. Over the budgets, N_opt ~ C^p and D_opt ~ C^q. Intervals come from residuals of the parabolas drawn anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError
from recjax.study.fit import COVERAGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """The runs of one budget `compute` (FLOPs): N, D and loss, each [n]; the parabola and its lowest point.

    `parabola` are the coefficients of log N - `centre`, highest power first. `is_inside` says whether the lowest
    point lies between the smallest and the largest size, and is one; if not, it is no optimum but a guess.
    """

    compute: float
    parameters: np.ndarray
    targets: np.ndarray
    loss: np.ndarray
    centre: float
    parabola: np.ndarray
    best_parameters: float
    best_targets: float
    best_loss: float
    is_inside: bool

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        """The parabola at sizes [m]."""
        return np.polyval(self.parabola, np.log(parameters) - self.centre)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """N_opt = G C^p and D_opt = H C^q: exponents with their central 90% over `samples` redraws."""

    p: float
    p_interval: tuple[float, float]
    q: float
    q_interval: tuple[float, float]
    budgets: int


def isoflop(compute: float, parameters: Any, targets: Any, loss: Any) -> IsoFlop:
    """The curve of one budget from N, D and loss of its runs; raises `ConfigError` for fewer than three sizes."""
    n, d, y = (np.asarray(values, float) for values in (parameters, targets, loss))
    if len(np.unique(n)) < 3:
        raise ConfigError(f"a parabola through {len(np.unique(n))} sizes", expected="three sizes or more for a budget")
    centre = float(np.log(n).mean())
    z = np.log(n) - centre
    parabola = np.polyfit(z, y, 2)
    at, is_inside = _lowest(parabola, z)
    bought = np.polyval(np.polyfit(z, np.log(d), 2), at)
    return IsoFlop(
        compute=compute,
        parameters=n,
        targets=d,
        loss=y,
        centre=centre,
        parabola=parabola,
        best_parameters=float(np.exp(at + centre)),
        best_targets=float(np.exp(bought)),
        best_loss=float(np.polyval(parabola, at)),
        is_inside=is_inside,
    )


def allocation(curves: Sequence[IsoFlop], *, samples: int = 1000, seed: int = 0) -> Allocation | None:
    """The exponents over the budgets that have an optimum inside; None for fewer than two of them."""
    curves = [curve for curve in curves if curve.is_inside]
    if len(curves) < 2:
        return None
    rng = np.random.default_rng(seed)
    log_c = np.log([curve.compute for curve in curves])
    drawn_n, drawn_d = np.empty((samples, len(curves))), np.empty((samples, len(curves)))
    for column, curve in enumerate(curves):
        z = np.log(curve.parameters) - curve.centre
        fitted = np.polyval(curve.parabola, z)
        residuals = curve.loss - fitted
        grown = residuals * np.sqrt(len(z) / max(len(z) - 3, 1))
        losses = fitted + rng.choice(grown, (samples, len(z))) * rng.choice([-1.0, 1.0], (samples, len(z)))
        bought = np.polyfit(z, np.log(curve.targets), 2)
        for row, parabola in enumerate(np.polyfit(z, losses.T, 2).T):
            at, _ = _lowest(parabola, z)
            drawn_n[row, column], drawn_d[row, column] = at + curve.centre, np.polyval(bought, at)
    best_n, best_d = (
        np.log([getattr(curve, name) for curve in curves]) for name in ("best_parameters", "best_targets")
    )
    (p, *p_drawn), (q, *q_drawn) = (
        np.polyfit(log_c, np.vstack([best, drawn]).T, 1)[0] for best, drawn in ((best_n, drawn_n), (best_d, drawn_d))
    )
    return Allocation(
        p=float(p), p_interval=_central(p_drawn), q=float(q), q_interval=_central(q_drawn), budgets=len(curves)
    )


def _lowest(parabola: np.ndarray, z: np.ndarray) -> tuple[float, bool]:
    """Where the parabola is lowest over the range of z, and whether that is its vertex."""
    bend, slope, _ = parabola
    if bend > 0 and z.min() <= -slope / (2 * bend) <= z.max():
        return float(-slope / (2 * bend)), True
    ends = np.array([z.min(), z.max()])
    return float(ends[np.argmin(np.polyval(parabola, ends))]), False


def _central(values: Any) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
