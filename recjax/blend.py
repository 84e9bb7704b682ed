"""Two models that rank together: a mixture of their scores, each brought to the same scale for every user.

A model that knows items by name and one that knows only how popular they have been are wrong about different things.
Scores of different models have no common unit, so each user's are standardised over the catalogue first (Wang et al.
2024, arXiv 2401.01497, section 5.6): what counts is how far an item stands above the others for this user. The
mixture is again an inner product, so that evaluation takes it like any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.module import Functional, Params
from recjax.ranking import queries_of

_SMALLEST = 1e-12


class Blend:
    """alpha z(first) + (1 - alpha) z(second), z the scores of a user less their mean, over their standard deviation.

    It stands where a `Functional` stands in evaluation; its parameters are those of `params`. Mean and deviation are
    over the `valid` rows of the catalogue. The mean is the same for all items of a user, and left out.
    """

    def __init__(self, first: Functional, second: Functional, valid: np.ndarray) -> None:
        self.models, self.valid = (first, second), valid

    def params(self, first: Params, second: Params, alpha: float) -> Params:
        """Parameters of the mixture; `alpha` in [0, 1] is one of them, so that another needs no compilation."""
        return {"first": first, "second": second, "alpha": np.float32(alpha)}

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of both, in equal parts."""
        first, second = (model.init(k) for model, k in zip(self.models, jax.random.split(key), strict=True))
        return self.params(first, second, 0.5)

    def bind(self, params: Params) -> Blend:
        """Itself: there is no module to be called otherwise."""
        return self

    def apply(self, params: Params, batch: Mapping[str, Any], *, train: bool, key: Any) -> dict[str, jax.Array]:
        """`query` [b, q, d] for the slots `query_at` [b, q] and `table` [v, d] or [b q, v, d] of both models."""
        at, parts, tables = batch["query_at"], [], []
        shares = (params["alpha"], 1 - params["alpha"])
        for name, model, share in zip(("first", "second"), self.models, shares, strict=True):
            out = model.apply(params[name], batch, train=train, key=key)
            query, table = queries_of(out, batch), out["table"]
            scores = jnp.einsum("bd,vd->bv" if table.ndim == 2 else "bd,bvd->bv", query, table)
            spread = jnp.std(scores, axis=1, where=self.valid[None])
            parts.append(share * query / jnp.maximum(spread, _SMALLEST)[:, None])
            tables.append(table)
        if {table.ndim for table in tables} == {2, 3}:
            rows = len(parts[0])
            tables = [jnp.broadcast_to(t, (rows, *t.shape[-2:])) if t.ndim == 2 else t for t in tables]
        query = jnp.concatenate(parts, axis=-1)
        return {"query": query.reshape(*at.shape, -1), "table": jnp.concatenate(tables, axis=-1)}


def best_share(value_of: Callable[[float], float], shares: Sequence[float]) -> tuple[float, dict[float, float]]:
    """The share with the highest value, the first of equals, and all values; to be asked of the validation split."""
    values = {share: value_of(share) for share in shares}
    return max(values, key=lambda share: values[share]), values
