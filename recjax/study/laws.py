"""The forms that losses are fitted with, each as a function of logarithms.

A law maps logarithms of its inputs to the logarithm of the loss; its parameters `theta` are logarithms as well, so
that all of them are positive without a constraint. Inputs are centred (`Law.centre`) before a fit, which keeps scale
and exponent apart; `Law.values` gives the parameters of the formula back. Everything takes batches: theta [..., p],
z [n, i] -> [..., n]. Nothing here knows where the losses come from.

    power       E + (N0 / N)^a                              Zhang et al. 2024; Hoffmann et al. 2022
    data        E + (D0 / U)^b                              the same in the number of different targets
    pure        (N0 / N)^a                                  Kaplan et al. 2020, eq. 1.1
    joint       E + A / N^a + B / D^b                       Hoffmann et al. 2022, eq. 2
    kaplan      ((Nc / N)^(aN / aD) + Dc / D)^aD            Kaplan et al. 2020, eq. 1.5
    repetition  E + (D0 / D_eff)^b                          Muennighoff et al. 2023, eq. 5
                D_eff = U + U r (1 - exp(-R / r))
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Values = Mapping[str, Any]  # of floats or of arrays [...], as theta is [p] or [..., p]
_EXPONENTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_FLOORS = (0.02, 0.3, 0.6, 0.8, 0.9, 0.97)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """One form: `log_loss(theta, z)`, first guesses for data (`starts`), and parameters by name (`values`)."""

    name: str
    inputs: tuple[str, ...]
    parameters: int
    formula: str
    log_loss: Callable[[np.ndarray, np.ndarray], np.ndarray]
    starts: Callable[[np.ndarray, np.ndarray], np.ndarray]
    values: Callable[[np.ndarray, np.ndarray], Values]
    is_logged: tuple[bool, ...] = (True,)

    def centre(self, x: np.ndarray) -> np.ndarray:
        """What is subtracted from the logarithms of the inputs `x` [n, i]: their means, 0 for an input as it is."""
        return np.where(self.is_logged, np.log(np.where(self.is_logged, x, 1.0)).mean(axis=0), 0.0)

    def place(self, x: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Inputs [n, i] as `log_loss` takes them."""
        return np.where(self.is_logged, np.log(np.where(self.is_logged, x, 1.0)), x) - centre


def effective_targets(unique: Any, repeats: Any, r: Any) -> Any:
    """D_eff = U + U r (1 - exp(-R / r)): what R repetitions of U targets are worth in new ones."""
    return unique + unique * r * -np.expm1(-repeats / r)


def _exp(log: Any) -> Any:
    return np.exp(np.clip(log, -12.0, 6.0))


def _column(theta: np.ndarray, at: int) -> np.ndarray:
    return theta[..., at, None]


def _power(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.logaddexp(_column(theta, 0), _column(theta, 1) - _exp(_column(theta, 2)) * z[:, 0])


def _pure(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    return _column(theta, 0) - _exp(_column(theta, 1)) * z[:, 0]


def _joint(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    of_n = _column(theta, 1) - _exp(_column(theta, 3)) * z[:, 0]
    of_d = _column(theta, 2) - _exp(_column(theta, 4)) * z[:, 1]
    return np.logaddexp(_column(theta, 0), np.logaddexp(of_n, of_d))


def _kaplan(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    a_n, a_d = _exp(_column(theta, 2)), _exp(_column(theta, 3))
    return a_d * np.logaddexp(_column(theta, 0) - a_n / a_d * z[:, 0], _column(theta, 1) - z[:, 1])


def _repetition(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    gain = np.log(effective_targets(np.ones(1), z[:, 1], _exp(_column(theta, 3))))
    return np.logaddexp(_column(theta, 0), _column(theta, 1) - _exp(_column(theta, 2)) * (z[:, 0] + gain))


def _power_starts(z: np.ndarray, loss: np.ndarray) -> np.ndarray:
    found = [(f * loss.min(), a) for f, a in itertools.product(_FLOORS, _EXPONENTS)]
    return np.array([(np.log(e), np.log(np.median(loss) - e), np.log(a)) for e, a in found])


def _pure_starts(z: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.array([(np.log(np.median(loss)), np.log(a)) for a in _EXPONENTS])


def _joint_starts(z: np.ndarray, loss: np.ndarray) -> np.ndarray:
    some = _EXPONENTS[1::2]
    found = [(f * loss.min(), a, b) for f, a, b in itertools.product(_FLOORS[::2], some, some)]
    return np.array([(np.log(e), *2 * [np.log((np.median(loss) - e) / 2)], np.log(a), np.log(b)) for e, a, b in found])


def _kaplan_starts(z: np.ndarray, loss: np.ndarray) -> np.ndarray:
    pairs = itertools.product(_EXPONENTS[:-1], _EXPONENTS[:-1])
    return np.array([(*2 * [np.log(np.median(loss)) / d - np.log(2)], np.log(n), np.log(d)) for n, d in pairs])


def _repetition_starts(z: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.array([(*s, np.log(r)) for s, r in itertools.product(_power_starts(z, loss)[::2], (0.5, 2.0, 8.0, 30.0))])


def _power_values(theta: np.ndarray, centre: np.ndarray) -> Values:
    a = _exp(theta[..., 2])
    return {"E": np.exp(theta[..., 0]), "log10_N0": _log10(centre[0] + theta[..., 1] / a), "a": a}


def _pure_values(theta: np.ndarray, centre: np.ndarray) -> Values:
    a = _exp(theta[..., 1])
    return {"log10_N0": _log10(centre[0] + theta[..., 0] / a), "a": a}


def _joint_values(theta: np.ndarray, centre: np.ndarray) -> Values:
    a, b = _exp(theta[..., 3]), _exp(theta[..., 4])
    scales = {"log10_A": _log10(theta[..., 1] + a * centre[0]), "log10_B": _log10(theta[..., 2] + b * centre[1])}
    return {"E": np.exp(theta[..., 0]), **scales, "a": a, "b": b}


def _kaplan_values(theta: np.ndarray, centre: np.ndarray) -> Values:
    a_n, a_d = _exp(theta[..., 2]), _exp(theta[..., 3])
    scales = {"log10_Nc": _log10(centre[0] + theta[..., 0] * a_d / a_n), "log10_Dc": _log10(centre[1] + theta[..., 1])}
    return {**scales, "aN": a_n, "aD": a_d}


def _repetition_values(theta: np.ndarray, centre: np.ndarray) -> Values:
    b = _exp(theta[..., 2])
    return {
        "E": np.exp(theta[..., 0]),
        "log10_D0": _log10(centre[0] + theta[..., 1] / b),
        "b": b,
        "r": _exp(theta[..., 3]),
    }


def _log10(natural: Any) -> Any:
    return natural / np.log(10.0)


POWER = Law(
    name="power",
    inputs=("N",),
    parameters=3,
    formula="E + (N0/N)^a",
    log_loss=_power,
    starts=_power_starts,
    values=_power_values,
)
PURE = Law(
    name="pure",
    inputs=("N",),
    parameters=2,
    formula="(N0/N)^a",
    log_loss=_pure,
    starts=_pure_starts,
    values=_pure_values,
)
DATA = dataclasses.replace(
    POWER,
    name="data",
    inputs=("U",),
    formula="E + (D0/U)^b",
    values=lambda theta, centre: dict(zip(("E", "log10_D0", "b"), _power_values(theta, centre).values(), strict=True)),
)
JOINT = Law(
    name="joint",
    inputs=("N", "D"),
    parameters=5,
    formula="E + A/N^a + B/D^b",
    log_loss=_joint,
    starts=_joint_starts,
    values=_joint_values,
    is_logged=(True, True),
)
KAPLAN = Law(
    name="kaplan",
    inputs=("N", "D"),
    parameters=4,
    formula="((Nc/N)^(aN/aD) + Dc/D)^aD",
    log_loss=_kaplan,
    starts=_kaplan_starts,
    values=_kaplan_values,
    is_logged=(True, True),
)
REPETITION = Law(
    name="repetition",
    inputs=("U", "R"),
    parameters=4,
    formula="E + (D0/D_eff)^b, D_eff = U + U r (1 - exp(-R/r))",
    log_loss=_repetition,
    starts=_repetition_starts,
    values=_repetition_values,
    is_logged=(True, False),
)
