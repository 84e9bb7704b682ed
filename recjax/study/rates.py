"""Which learning rate a size is trained with, and whether its run went on for long enough.

An untuned rate bends the law or turns it round, so each size takes the rate with the lowest validation loss of its own
sweep. A size without a sweep, above all one that is held out, takes the trend of the fitted sizes: a straight line of
log rate over log N, rounded to the nearest rate of the sweep. Test losses are never looked at here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from recjax.study.grid import METRIC, Size, Study
from recjax.study.ledger import Finished

RULE = "log-linear trend of the fitted sizes' best rates over N, rounded to the nearest rate of the sweep"


class Rates:
    """The learning rate of every size, from the sweeps: size name -> rate -> validation loss."""

    def __init__(self, study: Study, sweeps: Mapping[str, Mapping[float, float]]) -> None:
        self.tried = sweeps
        self._offered = sorted(study.learning_rates)
        self.best = {name: min(losses, key=lambda lr: (losses[lr], lr)) for name, losses in sweeps.items() if losses}
        fitted = [size for size in study.of("sizes") if size.name in self.best]
        self._log_n = np.log([size.parameters for size in fitted])
        self._log_rate = np.log([self.best[size.name] for size in fitted])

    def __call__(self, size: Size) -> float:
        """The rate of a size."""
        if size.name in self.best:
            return float(self.best[size.name])
        if not len(self._log_n):
            return float(self._offered[0])
        if len(self._log_n) == 1:
            wanted = self._log_rate[0]
        else:
            slope, offset = np.polyfit(self._log_n, self._log_rate, 1)
            wanted = slope * np.log(size.parameters) + offset
        return float(min(self._offered, key=lambda lr: abs(np.log(lr) - wanted)))

    def is_at_the_edge(self, name: str) -> bool:
        """Whether the best rate of a sweep is the first or last that was tried: a better one may lie beyond."""
        return name in self.best and self.best[name] in (self._offered[0], self._offered[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convergence:
    """Relative fall of the validation loss to the last evaluation, and by a run twice as long (None: not run)."""

    last_fall: float
    twice_fall: float | None
    tolerance: float

    @property
    def is_converged(self) -> bool:
        """Neither exceeds the tolerance; a longer run, where there is one, decides alone."""
        fall = self.last_fall if self.twice_fall is None else self.twice_fall
        return fall < self.tolerance


def convergence(run: Finished, twice: Finished | None, tolerance: float) -> Convergence:
    """Whether a run has come to its minimum. An early minimum, with losses rising after it, is one."""
    losses = [loss for _, loss in run.curve]
    is_last = len(losses) > 1 and losses[-1] <= min(losses)
    last_fall = (losses[-2] - losses[-1]) / losses[-1] if is_last else 0.0
    if len(losses) < 2:
        last_fall = float("inf")  # a single evaluation says nothing
    best = run.valid[METRIC]
    twice_fall = None if twice is None else (best - twice.valid[METRIC]) / best
    return Convergence(last_fall=last_fall, twice_fall=twice_fall, tolerance=tolerance)


def sweeps_of(found: Sequence[Finished]) -> dict[str, dict[float, float]]:
    """Validation losses of finished sweep cells, by size and rate."""
    out: dict[str, dict[float, float]] = {}
    for one in found:
        out.setdefault(one.size, {})[one.learning_rate] = one.valid[METRIC]
    return out
