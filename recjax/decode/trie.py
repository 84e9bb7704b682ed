"""The ids that exist, as arrays that a compiled program can walk: a static sparse trie over code sequences.

An id is a sequence of codes, one per level. The leaves of the trie are the ids in lexicographic order, so the ids
below any prefix are a range of leaves, and so are the children of a prefix among the prefixes one code longer: a
prefix is one number. Where many codes follow, a level is a table over all codes ("dense", the first levels); where few
do, it is compressed (CSR), padded to the most children that a prefix of the level has. The idea of a vectorised trie
with dense first levels is that of STATIC (Su et al. 2026, arXiv 2602.22647).

`Trie` is a pytree: a flat dict of int32 arrays, which can travel as weights do, and a hashable `TrieShape`, which is
all that a compiled program is specialised to. `recjax.decode.build` makes them. Nothing here knows a model, an item or
a score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrieShape:
    """What a compiled program has to know: codes per level, most children per level, dense levels, number of ids.

    `branch[level]` is how many children the search looks at below each prefix of `level` codes; in the first `dense`
    levels, where a child stands at the place of its code, that is all `sizes[level]`.
    """

    sizes: tuple[int, ...]
    branch: tuple[int, ...]
    dense: int
    num_ids: int

    @property
    def levels(self) -> int:
        """Codes of the longest id."""
        return len(self.sizes)


class Children(NamedTuple):
    """What may follow each of some prefixes; `c` is the level's `branch`.

    Child j of prefix m is node `edges[m, j]` of the next level, and exists where `edges[m, j + 1]` is larger. `codes`
    are those that lead there, None where child j has code j.
    """

    edges: Int[Array, "b m c1"]
    codes: Int[Array, "b m c"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """`arrays` and their `shape`; both come from `recjax.decode.build.build_trie`.

    Nodes of level l are the distinct prefixes of l codes in lexicographic order; those of the last level are the
    leaves. For each level l, `leaf_l` [nodes + 1] counts the leaves before a node; a dense level has `child_l`
    [nodes, size + 1], the children before each code; another one `code_l` [children + 1] and `first_l` [nodes + 1], the
    children before a node (in the last level, where children are leaves, `leaf_l` is just that). `row` [num_ids] and
    `leaf` [rows] translate between leaves and the rows of the code table that the trie was made of.
    """

    arrays: Mapping[str, Any]
    shape: TrieShape = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def children(self, level: int, nodes: Int[Array, "b m"]) -> Children:
        """The children of nodes of `level`."""
        if level < self.shape.dense:
            return Children(jnp.take(self.arrays[f"child_{level}"], nodes, axis=0, mode="clip"), None)
        first = self.arrays[f"{'leaf' if level == self.shape.levels - 1 else 'first'}_{level}"]
        begin = jnp.take(first, nodes, mode="clip")[..., None]
        end = jnp.take(first, nodes + 1, mode="clip")[..., None]
        edges = jnp.minimum(begin + jnp.arange(self.shape.branch[level] + 1)[None, None, :], end)
        return Children(edges, take(self.arrays[f"code_{level}"], edges[..., :-1]))

    def leaves_before(self, level: int, nodes: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """How many leaves come before each node of `level`; a node's own are from there to the next node's."""
        return nodes if level == self.shape.levels else take(self.arrays[f"leaf_{level}"], nodes)

    def rows_of(self, leaves: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The row of the code table that each leaf is the id of; 0 for leaf -1, which is none."""
        return jnp.where(leaves < 0, 0, jnp.take(self.arrays["row"], leaves, mode="clip"))

    def leaves_of(self, rows: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The leaf of each row of the code table; -1 for a row without an id, or outside the table."""
        known = (rows >= 0) & (rows < self.arrays["leaf"].shape[0])
        return jnp.where(known, jnp.take(self.arrays["leaf"], rows, mode="clip"), -1)

    def by_leaf(self, values: Shaped[Array, "*b v"]) -> Shaped[Array, "*b n"]:
        """What is given for each row of the code table (such as whether it may be shown), for each leaf."""
        return jnp.take(values, self.arrays["row"], axis=-1, mode="clip")


def take(values: Any, places: jax.Array) -> jax.Array:
    """values[places] for places that are known to be inside, which is the cheapest there is."""
    return jnp.asarray(values).at[places].get(mode="promise_in_bounds")


def take_own(values: jax.Array, places: jax.Array) -> jax.Array:
    """values[b, places[b]]: every row looks up places of its own."""
    return jax.vmap(take)(values, places)
