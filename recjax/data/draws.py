"""Random integers and weights that are the same bytes on every machine.

Raw Philox words (a stream that numpy keeps unchanged) are turned into integers with integer arithmetic only, and
weights are made with additions, products, quotients and square roots, which IEEE 754 rounds exactly. Logarithms,
exponentials and powers are avoided, because their last bit differs between processors and libraries.
"""

from __future__ import annotations

import numpy as np


class Stream:
    """One independent stream of random integers for each (seed, purpose)."""

    def __init__(self, seed: int, purpose: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed & (2**64 - 1), purpose], np.uint64))

    def raw(self, n: int) -> np.ndarray:
        """uint32 [n]: uniform 32-bit words."""
        return (self._bits.random_raw(n) >> np.uint64(32)).astype(np.uint32)

    def below(self, bound: int | np.integer | np.ndarray, n: int | None = None) -> np.ndarray:
        """int64 [n]: uniform in [0, bound), where 0 < bound < 2**31 is one number or one for each of the n draws."""
        n = len(bound) if n is None else n  # type: ignore[arg-type]
        return (self.raw(n).astype(np.int64) * bound) >> 32

    def order(self, n: int) -> np.ndarray:
        """int64 [n]: a random permutation of 0..n-1."""
        return np.argsort(self._bits.random_raw(n), kind="stable")


def power(base: np.ndarray, sixteenths: int) -> np.ndarray:
    """base ** (sixteenths / 16) in float64, for base > 0, by repeated square roots."""
    if sixteenths < 0:
        return 1.0 / power(base, -sixteenths)
    result, root = np.ones(np.shape(base)), np.asarray(base, np.float64)
    whole, rest = divmod(sixteenths, 16)
    for _ in range(whole):
        result = result * root
    for bit in (8, 4, 2, 1):
        root = np.sqrt(root)
        if rest & bit:
            result = result * root
    return result


def halving(steps: int) -> np.ndarray:
    """int64 [4 * steps + 1]: 1024 * 2**(-k / steps) for k = 0..4*steps; `steps` must be a power of two."""
    root = 0.5
    for _ in range(steps.bit_length() - 1):
        root = float(np.sqrt(root))
    values = [1024.0]
    for _ in range(4 * steps):
        values.append(values[-1] * root)
    return np.floor(np.array(values) + 0.5).astype(np.int64)
