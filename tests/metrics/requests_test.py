"""Metrics of requests against loops over requests."""

import numpy as np
import pytest

from recjax.metrics.requests import order_of_equals, ranks, request_metrics_by_user


@pytest.mark.parametrize("seed", range(4))
def test_they_are_means_over_requests_with_a_positive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    request = rng.permutation(np.repeat(rng.choice(1000, 40, replace=False), 12))
    owner = {r: int(rng.integers(0, 9)) for r in np.unique(request)}
    user = np.array([owner[r] for r in request])
    scores, positive = np.round(rng.normal(size=480), 1), rng.random(480) < 0.1
    ndcg, mrr, recall, tie = {}, {}, {}, order_of_equals(480)
    for r in np.unique(request):
        mine = np.flatnonzero(request == r)
        ordered = positive[mine[np.lexsort((tie[mine], -scores[mine]))]]
        if ordered.any():
            gains = ordered[:5] / np.log2(np.arange(5) + 2)
            ideal = 1 / np.log2(np.arange(min(ordered.sum(), 5)) + 2)
            ndcg[r], mrr[r] = gains.sum() / ideal.sum(), 1 / (np.argmax(ordered) + 1)
            recall[r] = ordered[:5].sum() / ordered.sum()
    assert 0 < len(ndcg) < 40
    found = request_metrics_by_user(scores, positive, request, user, 9, 5)
    assert np.isclose(found["request_ndcg@5"].mean(), np.mean(list(ndcg.values())))
    assert np.isclose(found["request_mrr"].mean(), np.mean(list(mrr.values())))
    assert np.isclose(found["request_recall@5"].mean(), np.mean(list(recall.values())))
    whole, n = np.mean(list(mrr.values())), len(mrr) / 9
    for u in range(9):
        mine = [value for r, value in mrr.items() if owner[r] == u]
        assert np.isclose(found["request_mrr"][u], whole + (sum(mine) - whole * len(mine)) / n)


def test_equal_scores_are_no_matter_of_place() -> None:
    """Positives that come first in their request, as they do where negatives are drawn for them, gain nothing by it."""
    assert ranks(np.array([1.0, 2.0, 0.0, 1.0]), np.array([5, 5, 5, 1])).tolist() == [1, 0, 2, 0]
    request = np.repeat(np.arange(4000), 10)
    positive = np.arange(40_000) % 10 == 0
    found = request_metrics_by_user(np.zeros(40_000), positive, request, np.zeros(40_000, np.int64), 1, 5)
    assert abs(found["request_recall@5"][0] - 0.5) < 0.03
    assert abs(found["request_mrr"][0] - (1 / np.arange(1, 11)).mean()) < 0.02


def test_without_a_positive_there_is_no_metric() -> None:
    nothing = np.zeros(4, bool)
    found = request_metrics_by_user(np.arange(4.0), nothing, np.array([0, 0, 1, 1]), np.zeros(4, int), 1, 10)
    assert all(np.isnan(values).all() for values in found.values())
