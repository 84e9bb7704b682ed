"""Which children still have an id below them that may come out: filters and exclusions, exact at every level.

The ids below a child are a range of leaves, so two things tell how many are left: how many leaves of the range a filter
allows, which the ranks of a bit vector give (32 leaves to a word, and a running count of the words before), and how
many of those are excluded, for which each excluded leaf looks up the child it is below. Neither the filter nor the
exclusions ever meet every child of every beam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from recjax.decode.trie import Trie, take, take_own

SHIFT = 5
WORD = 1 << SHIFT  # bits

# Of a level, the edges [b, m, c + 1] of its beams' children, and which beams count: which children are alive.
Alive = Callable[[int, jax.Array, jax.Array], jax.Array]


class BitRanks(NamedTuple):
    """How many bits are set before each place of a bit vector, or of several: words, and the count before each."""

    words: UInt32[Array, "*b w"]
    before: Int[Array, "*b w"]

    def __call__(self, places: jax.Array) -> jax.Array:
        """The rank of each place, 0 to n, in [b, ...]; if there is a bit vector for each row, in the place's own."""
        look_up = take if self.words.ndim == 1 else take_own
        at = places >> SHIFT
        words, before = look_up(self.words, at), look_up(self.before, at)
        lower = (jnp.uint32(1) << (places & (WORD - 1)).astype(jnp.uint32)) - jnp.uint32(1)
        return before + jax.lax.population_count(words & lower).astype(jnp.int32)


def bit_ranks(bits: Bool[Array, "*b n"]) -> BitRanks:
    """The ranks of `bits`."""
    n = bits.shape[-1]
    missing = WORD - n % WORD  # at least one, so that place n has a word
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)]).reshape(*bits.shape[:-1], -1, WORD)
    weights = (jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)).reshape((1,) * (bits.ndim - 1) + (WORD,))
    words = jnp.sum(jnp.where(bits, weights, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)
    counts = jax.lax.population_count(words).astype(jnp.int32)
    return BitRanks(words, jnp.cumsum(counts, axis=-1) - counts)


def make_alive(trie: Trie, allowed: Bool[Array, "*b n"] | None, exclude: Int[Array, "b s"] | None) -> Alive:
    """`alive(level, edges [b, m, c + 1], real [b, m]) -> [b, m, c]` for nodes of `level`; see `Trie.children`.

    Beams that are `real` come first and in ascending order of their nodes; the others have no child alive.
    """
    ranks = None if allowed is None else bit_ranks(allowed)
    excluded = None if exclude is None else _distinct(exclude, allowed, trie.shape.num_ids)

    def alive(level: int, edges: jax.Array, real: jax.Array) -> jax.Array:
        if ranks is None and excluded is None:  # every node has leaves
            return (edges[..., 1:] > edges[..., :-1]) & real[..., None]
        # All in one ascending order: what is below beams that do not count is past the last leaf.
        leaves = jnp.where(real[..., None], trie.leaves_before(level, edges), trie.shape.num_ids)
        left = jnp.diff(leaves if ranks is None else ranks(leaves))
        return left > (0 if excluded is None else _excluded_in(leaves, excluded))

    return alive


def _excluded_in(leaves: jax.Array, excluded: jax.Array) -> jax.Array:
    """How many of `excluded` [b, s] are in each range from leaves[b, m, j] to the next; -> [b, m, c]."""

    def count(starts: jax.Array, excluded: jax.Array) -> jax.Array:
        place = jnp.searchsorted(starts, excluded, side="right", method="scan_unrolled")
        return jnp.zeros(len(starts) + 1, jnp.int32).at[place].add(1)[1:]

    return jax.vmap(count)(leaves.reshape(leaves.shape[0], -1), excluded).reshape(leaves.shape)[..., :-1]


def _distinct(exclude: jax.Array, allowed: jax.Array | None, none: int) -> jax.Array:
    """`none`, which is in no range, in place of what excludes nothing: no leaf, not allowed anyway, or there before."""
    exclude = jnp.where((exclude < 0) | (exclude >= none), none, exclude).astype(jnp.int32)
    if allowed is not None:
        look_up = take if allowed.ndim == 1 else take_own
        exclude = jnp.where(look_up(allowed, jnp.minimum(exclude, none - 1)), exclude, none)
    exclude = jnp.sort(exclude, axis=1)
    again = jnp.pad(exclude[:, 1:] == exclude[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(again, none, exclude)
