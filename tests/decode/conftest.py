"""A toy model whose logits depend on query and prefix, in jax and in numpy, and a search by enumeration."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.decode.trie import Trie

STATES = 61  # of the toy model


@dataclasses.dataclass(frozen=True)
class Toy:
    """Logits by a table [b, levels, STATES, size]; the state is a number made of the prefix."""

    table: np.ndarray
    sizes: tuple[int, ...]

    @classmethod
    def random(cls, rng: np.random.Generator, b: int, sizes: tuple[int, ...]) -> Toy:
        return cls(rng.normal(size=(b, len(sizes), STATES, max(sizes)), scale=2).astype(np.float32), sizes)

    def logits(self, query: int, prefix: tuple[int, ...]) -> np.ndarray:
        at = 0
        for code in prefix:
            at = (at * 7 + code + 1) % STATES
        return self.table[query, len(prefix), at, : self.sizes[len(prefix)]].astype(np.float64)

    def step(self, table: jax.Array):
        """For `beam_search`, from a state of zeros [b, 1]."""

        def step(state: Any, codes: Any, level: int) -> tuple[jax.Array, Any]:
            if codes is not None:
                state = (state * 7 + codes + 1) % STATES
            logits = jnp.take_along_axis(table[:, level], state[..., None], axis=1)
            return logits[..., : self.sizes[level]], state

        return step


@dataclasses.dataclass(frozen=True)
class Reference:
    """What `beam_search` should find, in float64 by enumeration; `codes` are rows of codes, -1 where they end."""

    codes: np.ndarray

    def ids(self) -> list[tuple[int, ...]]:
        """By leaf number: all ids in lexicographic order."""
        return sorted(tuple(int(c) for c in row if c >= 0) for row in self.codes if row[0] >= 0)

    def following(self, allowed: set[int]) -> dict[tuple[int, ...], list[int]]:
        """The codes that may follow each prefix below which an allowed leaf is left."""
        found: dict[tuple[int, ...], set[int]] = {}
        for leaf, codes in enumerate(self.ids()):
            if leaf in allowed:
                for level, code in enumerate(codes):
                    found.setdefault(codes[:level], set()).add(code)
        return {prefix: sorted(codes) for prefix, codes in found.items()}

    def all_log_probs(self, toy: Toy, query: int, allowed: set[int]) -> dict[int, float]:
        """The log-probability of every allowed leaf."""
        following = self.following(allowed)
        of = {prefix: log_softmax(toy.logits(query, prefix), codes) for prefix, codes in following.items()}
        ids = self.ids()
        return {leaf: sum(of[ids[leaf][:level]][c] for level, c in enumerate(ids[leaf])) for leaf in sorted(allowed)}

    def beam(self, toy: Toy, query: int, allowed: set[int], beams: int, k: int) -> tuple[list[int], list[float], float]:
        """Leaves and log-probabilities of a beam search, and the smallest gap that decided who stayed."""
        following, leaf_of = self.following(allowed), {codes: leaf for leaf, codes in enumerate(self.ids())}
        kept, gap = [(0.0, ())] if allowed else [], np.inf
        for level in range(len(toy.sizes)):
            candidates = []
            for score, prefix in kept:
                if prefix not in following:  # an id that has ended
                    candidates.append((score, prefix))
                    continue
                of = log_softmax(toy.logits(query, prefix), following[prefix])
                candidates += [(score + value, (*prefix, code)) for code, value in of.items()]
            candidates.sort(key=lambda c: (-c[0], c[1]))
            keep = k if level == len(toy.sizes) - 1 else beams
            if len(candidates) > keep:
                gap = min(gap, candidates[keep - 1][0] - candidates[keep][0])
            kept = candidates[:keep]
        return [leaf_of[codes] for _, codes in kept], [score for score, _ in kept], gap


def log_softmax(logits: np.ndarray, codes: list[int]) -> dict[int, float]:
    top = max(logits[c] for c in codes)
    total = np.log(sum(np.exp(logits[c] - top) for c in codes)) + top
    return {c: float(logits[c] - total) for c in codes}


def random_codes(rng: np.random.Generator, n: int, sizes: tuple[int, ...], ragged: bool) -> np.ndarray:
    """At most `n` distinct ids of unequal branching, in any order, some of them short, with rows that have none."""
    codes = np.stack([np.floor(size * rng.random(n) ** rng.uniform(1, 3)).astype(np.int64) for size in sizes], axis=1)
    codes = np.unique(codes, axis=0)
    for level in range(1, len(sizes)) if ragged else ():
        prefixes, which = np.unique(codes[:, :level], axis=0, return_inverse=True)
        ends = (rng.random(len(prefixes)) < 0.1)[which]  # one short id instead of all that begin like this
        codes[ends, level:] = -1
        codes = np.unique(codes, axis=0)
    codes = np.concatenate([codes, np.full((2, len(sizes)), -1)])
    return rng.permutation(codes).astype(np.int32)


def alike(tries: list[Trie]) -> list[Trie]:
    """The same tries with as many unused entries at the end of each array as make them all of one shape."""
    shapes = [trie.shape for trie in tries]
    branch = tuple(max(of) for of in zip(*(shape.branch for shape in shapes), strict=True))
    shape = dataclasses.replace(shapes[0], branch=branch, num_ids=max(shape.num_ids for shape in shapes))

    def pad(name: str, array: np.ndarray) -> np.ndarray:
        longest = max(len(trie.arrays[name]) for trie in tries)
        return np.pad(array, [(0, longest - len(array))] + [(0, 0)] * (array.ndim - 1), mode="edge")

    return [Trie({name: pad(name, array) for name, array in trie.arrays.items()}, shape) for trie in tries]


@pytest.fixture(scope="session")
def decoding() -> SimpleNamespace:
    """The names of this file, for the tests beside it."""
    return SimpleNamespace(Toy=Toy, Reference=Reference, random_codes=random_codes, alike=alike)
