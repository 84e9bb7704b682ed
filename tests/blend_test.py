"""A mixture of two models' scores against the same in plain numpy, and its ends."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.blend import Blend, best_share
from recjax.core.module import Functional, Module, Rngs, param
from recjax.ranking import queries_of

ROWS, VALID = 20, np.arange(20) >= 3


class Toy(Module):
    """Queries and tables drawn once; `by_row` gives each row of the batch a table of its own."""

    def __init__(self, *, width: int, by_row: bool, rngs: Rngs) -> None:
        normal = jax.nn.initializers.normal(1.0)
        shape = (4, ROWS, width) if by_row else (ROWS, width)
        self.table = param(rngs, shape, (None,) * len(shape), normal)
        self.hidden = param(rngs, (4, 5, width), (None, None, None), normal)

    def __call__(self, batch: Any, *, train: bool, key: Any) -> dict[str, jax.Array]:
        return {"hidden": self.hidden[...], "table": self.table[...]}


def _scores(out: dict[str, Any], batch: dict[str, Any]) -> np.ndarray:
    query, table = np.asarray(queries_of(out, batch)), np.asarray(out["table"])
    return np.einsum("bd,bvd->bv", query, np.broadcast_to(table, (4, *table.shape[-2:])))


@pytest.mark.parametrize("by_row", [(False, False), (True, False), (True, True)])
def test_scores_are_a_mixture_of_standardised_ones(by_row: tuple[bool, bool]) -> None:
    models = [
        Functional(functools.partial(Toy, width=width, by_row=one)) for width, one in zip((3, 5), by_row, strict=True)
    ]
    params = [m.init(jax.random.key(i)) for i, m in enumerate(models)]
    batch = {"query_at": jnp.asarray([[4], [0], [2], [1]])}
    blend = Blend(models[0], models[1], VALID)
    each = []
    for model, p in zip(models, params, strict=True):
        scores = _scores(model.apply(p, batch, train=False, key=None), batch)[:, VALID]
        each.append((scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True))
    for alpha in (0.0, 0.3, 1.0):
        out = blend.apply(blend.params(params[0], params[1], alpha), batch, train=False, key=None)
        found = _scores(out, batch)[:, VALID]
        expected = alpha * each[0] + (1 - alpha) * each[1]
        np.testing.assert_allclose(found - found.mean(1, keepdims=True), expected, atol=1e-4)


def test_the_best_share_is_the_first_of_the_best() -> None:
    asked = []

    def value_of(share: float) -> float:
        asked.append(share)
        return -abs(share - 0.5)

    assert best_share(value_of, (0.0, 0.25, 0.75, 1.0)) == (0.25, {0.0: -0.5, 0.25: -0.25, 0.75: -0.25, 1.0: -0.5})
    assert asked == [0.0, 0.25, 0.75, 1.0]
