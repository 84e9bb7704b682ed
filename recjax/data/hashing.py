"""Random draws that are a function of their key alone: the same on every machine, in any order, after any restart.

A draw is a hash (SplitMix64) of what it is for, such as (seed, purpose, task, epoch) and then the number of an example
and of an event. Nothing is drawn one after the other, so nothing has to be remembered.
"""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def hashes(count: int, *key: int) -> np.ndarray:
    """uint64 [count]: element k is a hash of the key and k."""
    state = np.zeros(1, np.uint64)
    for value in key:
        state = mixed(state ^ np.array([value % 2**64], np.uint64))
    return mixed(state + np.arange(count, dtype=np.uint64) * _STEP)


def mixed(x: np.ndarray) -> np.ndarray:
    """uint64: each number hashed; different numbers give different hashes."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_with(state: np.ndarray, number: np.ndarray) -> np.ndarray:
    """uint64: hash of each uint64 of `state` (itself a hash) and a whole number."""
    return mixed(state + number.astype(np.uint64) * _STEP)


def uniform(drawn: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of uint64 hashes, exactly the same everywhere."""
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *key: int) -> np.ndarray:
    """The numbers 0 to count - 1 in an order that depends on the key alone."""
    return np.argsort(hashes(count, *key), kind="stable")
