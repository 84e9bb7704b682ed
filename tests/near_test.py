"""A catalogue searched approximately answers like one that is searched exactly, from inside a compiled program."""

from functools import partial

import jax
import numpy as np
import pytest

from recjax.core.module import Functional
from recjax.data.vocab import FIRST_ITEM
from recjax.index.approximate import ApproximateIndex, Approximation
from recjax.models.sequence import Sequence
from recjax.near import Near
from recjax.nn.config import TransformerConfig
from recjax.retrieve import Rows

ITEMS, ROWS, B, L, K = 500, 640, 4, 6, 10


@pytest.fixture(scope="module")
def trained() -> tuple[Functional, dict]:
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2)
    model = Functional(partial(Sequence, num_rows=ROWS, encoder=encoder, max_length=L))
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize("filtered", ["none", "all alike", "each its own"])
def test_it_answers_like_the_exact_search(trained, filtered: str) -> None:
    model, params = trained
    rng = np.random.default_rng(0)
    real = np.arange(L)[None] < rng.integers(1, L + 1, (B, 1))
    batch = {
        "history_ids": np.where(real, rng.integers(FIRST_ITEM, ITEMS, (B, L)), 0).astype(np.int32),
        "positions": np.where(real, np.arange(L), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "query_at": real.sum(axis=1, keepdims=True).astype(np.int32) - 1,
    }
    given = {"exclude": batch["history_ids"]}
    if filtered != "none":
        given["allowed"] = rng.random((B, ROWS) if filtered == "each its own" else ROWS) < 0.5
    valid = (np.arange(ROWS) >= FIRST_ITEM) & (np.arange(ROWS) < FIRST_ITEM + ITEMS)
    table = np.asarray(params["table"])
    near = Near(ApproximateIndex(table, valid=valid, config=Approximation(lists=10, probes=10)))
    assert near.most == ITEMS

    @jax.jit
    def both(params, batch, given):
        return tuple(of(model, params, batch, K, **given) for of in (near, Rows(ITEMS)))

    found, expected = both(params, batch, given)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
