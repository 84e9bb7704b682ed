"""Recall and average precision of several relevant items, against the formulas one user at a time."""

import numpy as np

from recjax.metrics.relevance import recall_and_map


def test_equals_the_formula():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(np.arange(1, 60))[:20] for _ in range(50)])
    rows[:5, 12:] = 0
    relevant = [rng.permutation(np.arange(1, 60))[: rng.integers(1, 40)] for _ in range(50)]
    recall, precision = recall_and_map(rows, relevant)
    for best, wanted, r, p in zip(rows, map(set, relevant), recall, precision, strict=True):
        hits = [row in wanted for row in best.tolist()]
        assert r == sum(hits) / len(wanted)
        mean = sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / min(len(wanted), 20)
        assert np.isclose(p, mean)


def test_a_perfect_list_has_one_and_an_empty_one_nothing():
    recall, precision = recall_and_map(np.array([[3, 5, 7], [0, 0, 0]]), [np.array([7, 5, 3]), np.array([4])])
    assert recall.tolist() == precision.tolist() == [1, 0]
