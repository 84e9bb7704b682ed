"""Intervals for means over users, and for the difference between two systems on the same users.

Percentile bootstrap: users are drawn with replacement `samples` times, and the interval runs between the
(1 - level) / 2 and (1 + level) / 2 quantiles of the resampled means. For two systems the same users are drawn for
both (a paired bootstrap), so what is common to both, such as easy and hard users, cancels. Where several values have
a cause in common (the answers to one query), they form a cluster, and clusters are drawn instead (Field and Welsh
2007), each with all its values. Seeded: the same values give the same interval.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

_CELLS = 2**22  # draws held at a time


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Float[np.ndarray, " n"], *, samples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of per-user values and its bootstrap interval."""
    return intervals(values[:, None], samples=samples, seed=seed, level=level)[0]


def paired_difference(
    ours: Float[np.ndarray, " n"],
    theirs: Float[np.ndarray, " n"],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The mean of `ours - theirs` and its paired bootstrap interval; entry i of both is the same user."""
    return interval(ours - theirs, samples=samples, seed=seed, level=level)


def intervals(
    values: Float[np.ndarray, "n m"],
    *,
    clusters: Int[np.ndarray, " n"] | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """`interval` for every column, all from the same draws of users, or of `clusters`: the number of each value's."""
    means_of_all = values.mean(0) if len(values) else None
    sizes = np.ones(len(values))
    if clusters is not None and len(values):
        clusters = np.unique(clusters, return_inverse=True)[1]
        sizes = np.bincount(clusters).astype(np.float64)
        values = np.stack([np.bincount(clusters, column) for column in values.T], axis=1)
    n, columns = values.shape
    if means_of_all is None:
        return [Interval(float("nan"), float("nan"), float("nan"))] * columns
    rng = np.random.default_rng(seed)
    means = np.empty((samples, columns))
    step = max(1, _CELLS // n)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = times @ values / (times @ sizes)[:, None]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(*map(float, triple)) for triple in zip(means_of_all, low, high, strict=True)]
