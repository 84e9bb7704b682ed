"""What the worlds of `worlds.py` are built from: distributions at a stated distance, and histories at a stated mix.

Nothing here is left to chance that can be arranged: counts follow a distribution as closely as whole numbers can, and
what must not meet in a history does not.
"""

from __future__ import annotations

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.draws import Stream

_ROUNDS = 200


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


def dealt(units: np.ndarray, ends: np.ndarray, per_user: int, apart: np.ndarray, stream: Stream) -> np.ndarray:
    """int64 [users, 2 * per_user + 2]: units (one or two items each, -1 fills up) dealt to users, then their `ends`.

    `units` is [n, 2]; `ends` [users, 2] is what comes after a user's units (-1 where nothing does), and there must be
    room for all units. `apart` gives each item the number of a pair of which no user has both items, -1 for the
    others. Raises `ConfigError` when they cannot be kept apart.
    """
    slots = np.full((len(ends) * per_user, 2), -1, np.int64)
    if len(units) > len(slots):
        raise ConfigError(f"{len(units)} units do not fit {len(ends)} users of {per_user}")
    slots[: len(units)] = units
    slots = slots[stream.order(len(slots))]
    for _ in range(_ROUNDS):
        wrong = _together(slots, ends, per_user, apart)
        if not len(wrong):
            return np.concatenate([slots.reshape(len(ends), -1), ends], axis=1)
        for one, other in zip(wrong, stream.below(len(slots), len(wrong)), strict=True):
            slots[[one, other]] = slots[[other, one]]
    raise ConfigError(
        "items that must not meet cannot be kept apart",
        where=f"{len(ends)} users with {per_user} units each",
        mend="take more items, or shorter histories",
    )


def compacted(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Users and items of all events, user after user in order; -1 is no event."""
    user, place = np.nonzero(rows >= 0)
    return user, rows[user, place]


def _together(slots: np.ndarray, ends: np.ndarray, per_user: int, apart: np.ndarray) -> np.ndarray:
    """Numbers of slots to be moved, one for each pair that a user has both items of; in `ends` both may be."""
    rows = np.concatenate([slots.reshape(len(ends), -1), ends], axis=1)
    user, item = compacted(rows)
    place = np.nonzero(rows >= 0)[1]
    pair = apart[item]
    kept = pair >= 0
    user, item, pair, place = user[kept], item[kept], pair[kept], place[kept]
    order = np.lexsort((place, pair, user))
    user, item, pair, place = user[order], item[order], pair[order], place[order]
    meets = (user[1:] == user[:-1]) & (pair[1:] == pair[:-1]) & (item[1:] != item[:-1])
    meets &= place[:-1] < 2 * per_user
    return np.unique(user[:-1][meets] * per_user + place[:-1][meets] // 2)
