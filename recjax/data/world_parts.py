"""What the worlds of `worlds.py` are built from: distributions at a stated distance, and items drawn from them.

Nothing is left to chance that can be arranged: counts follow a distribution as closely as whole numbers can.
"""

from __future__ import annotations

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.draws import Stream


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats; infinite where q has no room for p."""
    inside = p > 0
    if (q[inside] <= 0).any():
        return float("inf")
    return float((p[inside] * np.log(p[inside] / q[inside])).sum())


def shares(items: np.ndarray, num_items: int) -> np.ndarray:
    """float64 [num_items]: which share of `items` each item has."""
    return np.bincount(items, minlength=num_items) / len(items)


def tilted(p: np.ndarray, direction: np.ndarray, distance: float, *, draws: int) -> np.ndarray:
    """A distribution q near p * exp(t * direction), with t such that KL(p || q) is `distance` nats.

    It is that of `draws` draws, whole numbers of which every item has at least one; where that alone is further away,
    t is 0. Raises `ConfigError` when no t reaches the distance.
    """

    def at(t: float) -> np.ndarray:
        log = np.log(p) + t * direction
        weight = np.exp(log - log.max())
        return (1 + counts(weight / weight.sum(), draws - len(p))) / draws

    if draws <= len(p):
        raise ConfigError(f"{draws} draws of {len(p)} items", expected="more draws than items")
    low, high = 0.0, 1.0
    while kl(p, at(high)) < distance:
        low, high = high, 2 * high
        if high > 2**20:
            raise ConfigError(
                f"no distribution is {distance} nats away",
                expected=f"at most {kl(p, at(high)):.2f} with {draws} draws of {len(p)} items",
            )
    if kl(p, at(0.0)) >= distance:
        return at(0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(p, at(middle)) < distance else (low, middle)
    return at(high)


def counts(p: np.ndarray, size: int) -> np.ndarray:
    """int64: whole numbers that sum to `size` and are those of p to less than one (largest remainders)."""
    exact = p * size
    whole = np.floor(exact + 1e-6).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: size - int(whole.sum())]] += 1
    return whole


def deck(p: np.ndarray, size: int, stream: Stream) -> np.ndarray:
    """int64 [size]: shuffled items, each as often as p says."""
    return np.repeat(np.arange(len(p)), counts(p, size))[stream.order(size)]


def bell(stream: Stream, n: int) -> np.ndarray:
    """float64 [n]: bell-shaped with mean 0 and deviation 1, from sums of whole numbers."""
    parts = stream.below(2**16, 12 * n).reshape(12, n)
    return parts.sum(0) / 2.0**16 - 6.0


def compacted(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Users and items of all events, user after user in order; -1 is no event."""
    user, place = np.nonzero(rows >= 0)
    return user, rows[user, place]
