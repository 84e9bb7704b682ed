"""The dense part of a log: every user and every item left has so many events, counted within what is left.

Leaving out rare users makes items rarer and the other way round, so it takes several rounds. Papers differ in whether
and how they do this, and it changes every number: a task that does says so in its manifest.
"""

from __future__ import annotations

import numpy as np


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """bool [n]: which events are in the k-core of the log, the largest part where all users and items have k events.

    Event e is that of user `users[e]` with item `items[e]`, numbered from 0. Which one comes first makes no difference.
    """
    kept = np.ones(len(users), bool)
    while kept.any():
        few = np.zeros(len(users), bool)
        for codes in (users, items):
            few |= np.bincount(codes[kept], minlength=int(codes.max()) + 1)[codes] < k
        if not (few & kept).any():
            break
        kept &= ~few
    return kept


def first_of_pairs(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """bool [n]: which events, in the order given, are the first of their user with their item."""
    _, first = np.unique(np.stack([users, items]), axis=1, return_index=True)
    kept = np.zeros(len(users), bool)
    kept[first] = True
    return kept
