"""Metrics of requests against loops over requests."""

import numpy as np
import pytest

from recjax.metrics.requests import ranks, request_metrics_by_user


@pytest.mark.parametrize("seed", range(4))
def test_they_are_means_over_requests_with_a_positive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    request = rng.permutation(np.repeat(rng.choice(1000, 40, replace=False), 12))
    owner = {r: int(rng.integers(0, 9)) for r in np.unique(request)}
    user = np.array([owner[r] for r in request])
    scores, positive = np.round(rng.normal(size=480), 1), rng.random(480) < 0.1
    ndcg, mrr = {}, {}
    for r in np.unique(request):
        mine = np.flatnonzero(request == r)
        ordered = positive[mine[np.argsort(-scores[mine], kind="stable")]]
        if ordered.any():
            gains = ordered[:5] / np.log2(np.arange(5) + 2)
            ideal = 1 / np.log2(np.arange(min(ordered.sum(), 5)) + 2)
            ndcg[r], mrr[r] = gains.sum() / ideal.sum(), 1 / (np.argmax(ordered) + 1)
    assert 0 < len(ndcg) < 40
    found = request_metrics_by_user(scores, positive, request, user, 9, 5)
    assert np.isclose(found["request_ndcg@5"].mean(), np.mean(list(ndcg.values())))
    assert np.isclose(found["request_mrr"].mean(), np.mean(list(mrr.values())))
    whole, n = np.mean(list(mrr.values())), len(mrr) / 9
    for u in range(9):
        mine = [value for r, value in mrr.items() if owner[r] == u]
        assert np.isclose(found["request_mrr"][u], whole + (sum(mine) - whole * len(mine)) / n)


def test_equal_scores_stand_in_the_order_of_rows() -> None:
    assert ranks(np.array([1.0, 2.0, 1.0, 1.0]), np.array([5, 5, 5, 1])).tolist() == [1, 0, 2, 0]


def test_without_a_positive_there_is_no_metric() -> None:
    nothing = np.zeros(4, bool)
    found = request_metrics_by_user(np.arange(4.0), nothing, np.array([0, 0, 1, 1]), np.zeros(4, int), 1, 10)
    assert all(np.isnan(values).all() for values in found.values())
