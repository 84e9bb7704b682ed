"""A trie holds exactly the ids it was made of, whatever levels are tables; what is no set of ids is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import DataError
from recjax.decode.build import build_trie
from recjax.decode.trie import Trie, TrieShape

SIZES = (5, 4, 3)


def walk(trie: Trie) -> list[tuple[int, ...]]:
    """The code sequence of each leaf in turn, by asking for children alone."""
    found = [()]
    for level in range(trie.shape.levels):
        edges, codes = trie.children(level, jnp.arange(len(found))[None])
        assert edges.shape == (1, len(found), trie.shape.branch[level] + 1)
        if codes is None:
            codes = jnp.broadcast_to(jnp.arange(trie.shape.sizes[level]), edges[..., :-1].shape)
        below = []
        for node, prefix in enumerate(found):
            first, last = trie.leaves_before(level + 1, edges[0, node, jnp.array([0, -1])]).tolist()
            assert level == 0 or [first, last] == trie.leaves_before(level, jnp.array([node, node + 1])).tolist()
            for child, code in enumerate(codes[0, node].tolist()):
                if edges[0, node, child + 1] > edges[0, node, child]:
                    assert edges[0, node, child] == len(below)
                    below.append((*prefix, code))
        found = below
    return found


@pytest.mark.parametrize("dense", [0, 1, 2, 3, None])
@pytest.mark.parametrize("ragged", [False, True])
def test_it_holds_exactly_the_ids(decoding, dense, ragged):
    codes = decoding.random_codes(np.random.default_rng(3), 40, SIZES, ragged)
    trie = build_trie(codes, SIZES, dense=dense)
    ids = decoding.Reference(codes).ids()
    assert walk(trie) == [(*codes, *[0] * (len(SIZES) - len(codes))) for codes in ids]
    assert trie.shape.num_ids == len(ids)
    rows = np.asarray(trie.rows_of(jnp.arange(len(ids))))
    assert [tuple(c for c in codes[row].tolist() if c >= 0) for row in rows] == ids


def test_leaves_and_rows_are_each_others_inverse(decoding):
    codes = decoding.random_codes(np.random.default_rng(4), 40, SIZES, True)
    trie = build_trie(codes, SIZES)
    has_id = codes[:, 0] >= 0
    leaves = np.asarray(trie.leaves_of(jnp.arange(len(codes))))
    assert sorted(leaves[has_id].tolist()) == list(range(trie.shape.num_ids)) and (leaves[~has_id] == -1).all()
    np.testing.assert_array_equal(trie.rows_of(jnp.asarray(leaves[has_id])), np.flatnonzero(has_id))
    assert trie.leaves_of(jnp.array([-1, len(codes)])).tolist() == [-1, -1]
    assert trie.rows_of(jnp.array([[-1]])).tolist() == [[0]]
    values = np.arange(2 * len(codes)).reshape(2, -1)
    by_leaf = np.asarray(trie.by_leaf(jnp.asarray(values)))
    np.testing.assert_array_equal(by_leaf[:, leaves[has_id]], values[:, has_id])


def test_the_order_of_rows_changes_nothing_but_their_numbers(decoding):
    rng = np.random.default_rng(5)
    codes = decoding.random_codes(rng, 40, SIZES, True)
    one, other = build_trie(codes, SIZES), build_trie(rng.permutation(codes), SIZES)
    assert one.shape == other.shape
    for name in set(one.arrays) - {"row", "leaf"}:
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name])


def test_levels_are_tables_while_those_are_small_or_full():
    codes = np.unique(np.random.default_rng(6).integers(0, 256, (30_000, 3)), axis=0)
    assert build_trie(codes, (256,) * 3).shape.dense == 2
    many = np.arange(0, 6_000_000, 5)[:, None]
    assert build_trie(many[:2], (100,)).shape.dense == 1
    assert build_trie(many, (len(many) * 5,)).shape.dense == 0
    assert build_trie(many // 3, (len(many) * 5 // 3,)).shape.dense == 1


def test_memory_is_a_few_numbers_for_each_id():
    rng = np.random.default_rng(7)
    codes = np.unique(rng.integers(0, 256, (100_000, 4)), axis=0)
    trie = build_trie(codes, (256,) * 4)
    # Rows, leaves, and twice a code and a count for each (nearly) distinct prefix; two small tables.
    assert trie.nbytes < 4 * 6 * len(codes) + 4 * 257 * 257 + 8 * 2**16
    assert all(array.dtype == np.int32 for array in trie.arrays.values())


def test_it_passes_through_jit_and_json(decoding):
    trie = build_trie(decoding.random_codes(np.random.default_rng(8), 30, SIZES, True), SIZES)
    described = json.loads(json.dumps(dataclasses.asdict(trie.shape)))
    shape = TrieShape(**{name: tuple(v) if isinstance(v, list) else v for name, v in described.items()})
    assert shape == trie.shape and hash(shape) == hash(trie.shape)
    again = jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t))(trie)
    assert again.shape == trie.shape
    jax.tree.map(np.testing.assert_array_equal, dict(again.arrays), dict(trie.arrays))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[0, 1], [2, 3], [0, 1], [2, 3]], r"2 ids are.*rows 0 and 2: 0-1; rows 1 and 3: 2-3"),
        ([[3, 1], [3, -1]], r"1 ids are those of other rows or begin them.*rows 1 and 0: 3 and 3-1"),
        ([[0, 1], [4, 0]], r"row 1 of the code table has code 4 at level 0.*from 0 to 3"),
        ([[0, -2]], r"row 0 of the code table has code -2 at level 1"),
        ([[-1, -1], [-1, 2]], r"row 1 of the code table goes on after its end: \[-1, 2\]"),
        ([[-1, -1]], "no row of the code table has an id"),
        ([[0.5, 1]], "type float64"),
        ([[0, 1, 2]], r"shape \(1, 3\).*2 levels"),
    ],
)
def test_what_is_no_set_of_ids_is_refused(codes, expected):
    with pytest.raises(DataError, match=f"(?s){expected}"):
        build_trie(np.asarray(codes), (4, 4))
