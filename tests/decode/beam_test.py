"""The beam finds what enumeration finds, on 500 random catalogues: ragged, filtered, with ids taken out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.decode.beam import beam_search
from recjax.decode.build import build_trie

QUERIES, CATALOGUES = 2, 42  # for each of 12 programs
CLOSE = 1e-5  # two prefixes closer than this are one to float32


class Case(NamedTuple):
    """One program, run on `CATALOGUES` catalogues: sizes, dense levels, and who may come out."""

    sizes: tuple[int, ...]
    ids: int
    dense: int
    ragged: bool
    filters: str  # "", "all" queries alike, "each" its own
    excluded: int


CASES = [
    Case((30,), 25, 1, False, "", 0),
    Case((6, 9), 40, 0, True, "all", 4),
    Case((5, 4, 3), 50, 3, True, "each", 0),
    Case((4, 9, 2), 50, 0, True, "", 9),
    Case((2, 3, 4, 5), 70, 2, True, "each", 5),
    Case((17, 2, 6, 3), 60, 1, True, "", 0),
    Case((3, 3, 3, 3), 50, 2, False, "all", 12),
]
FEW = [
    (Case((6, 9), 40, 1, True, "", 0), 1, 1),
    (Case((5, 4, 3), 50, 2, True, "", 5), 4, 4),
    (Case((2, 3, 4, 5), 70, 1, True, "all", 5), 5, 12),
    (Case((2, 3, 4, 5), 70, 4, False, "each", 9), 2, 3),
    (Case((17, 2, 6), 60, 0, True, "each", 5), 6, 10),
]


def catalogues(decoding, case, seed):
    """Tries of one shape, with a model, the reference, and what may come out of each query: leaf numbers."""
    rng = np.random.default_rng(seed)
    drawn = [decoding.random_codes(rng, case.ids, case.sizes, case.ragged) for _ in range(CATALOGUES)]
    tries = decoding.alike([build_trie(codes, case.sizes, dense=case.dense) for codes in drawn])
    for codes, trie in zip(drawn, tries, strict=True):
        reference, n = decoding.Reference(codes), trie.shape.num_ids
        count = len(reference.ids())
        shape = (n,) if case.filters == "all" else (QUERIES, n)
        allowed = rng.random(shape) < rng.choice([0.1, 0.5, 0.9])
        exclude = rng.integers(-1, count, (QUERIES, case.excluded))
        exclude[:, : case.excluded // 2] = exclude[:, :1]  # the same one again
        given, left = {}, [set(range(count)) for _ in range(QUERIES)]
        if case.filters:
            given["allowed"] = allowed
            left = [{leaf for leaf in every if np.broadcast_to(allowed, (QUERIES, n))[q, leaf]}
                    for q, every in enumerate(left)]  # fmt: skip
        if case.excluded:
            given["exclude"] = exclude.astype(np.int32)
            left = [every - set(exclude[q].tolist()) for q, every in enumerate(left)]
        yield trie, decoding.Toy.random(rng, QUERIES, case.sizes), reference, given, left


def program(toy, *, beams, k):
    def search(trie, table, given):
        return beam_search(toy.step(table), jnp.zeros((QUERIES, 1), jnp.int32), trie, beams=beams, k=k, **given)

    return jax.jit(search)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_enough_beams_it_is_enumeration(decoding, case):
    search = None
    for trie, toy, reference, given, left in catalogues(decoding, case, seed=1):
        k = trie.shape.num_ids + 3
        search = search or program(toy, beams=k, k=k)
        found = search(trie, toy.table, given)
        for q in range(QUERIES):
            expected = reference.all_log_probs(toy, q, left[q])
            leaves, log_probs = np.asarray(found.leaf[q]), np.asarray(found.log_prob[q])
            valid = np.asarray(found.valid[q])
            assert valid.tolist() == [True] * len(expected) + [False] * (k - len(expected))
            assert sorted(leaves[valid].tolist()) == sorted(expected)
            assert (leaves[~valid] == -1).all() and (log_probs[~valid] == -np.inf).all()
            np.testing.assert_allclose(log_probs[valid], [expected[leaf] for leaf in leaves[valid]], atol=CLOSE)
            assert (np.diff(log_probs[valid]) <= 0).all()
            if expected:
                np.testing.assert_allclose(np.exp(log_probs[valid].astype(np.float64)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(("case", "beams", "k"), FEW, ids=str)
def test_with_few_beams_it_is_a_beam_search(decoding, case, beams, k):
    search, decided, asked = None, 0, 0
    for trie, toy, reference, given, left in catalogues(decoding, case, seed=beams):
        search = search or program(toy, beams=beams, k=k)
        found = search(trie, toy.table, given)
        for q in range(QUERIES):
            leaves, log_probs, gap = reference.beam(toy, q, left[q], beams, k)
            valid = np.asarray(found.valid[q])
            assert set(np.asarray(found.leaf[q])[valid].tolist()) <= left[q]
            asked += 1
            if gap < CLOSE:
                continue
            decided += 1
            assert valid.sum() == len(leaves)
            np.testing.assert_allclose(np.asarray(found.log_prob[q])[valid], log_probs, atol=CLOSE)
            if len(log_probs) < 2 or (-np.diff(log_probs)).min() > CLOSE:
                assert np.asarray(found.leaf[q])[valid].tolist() == leaves
    assert decided >= 0.98 * asked
