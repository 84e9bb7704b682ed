"""The smallest model of users and items: a table for both, unit vectors, an inner product. Its capacity is the table.

What it learns is passed on to rankers as the vectors of their fields (`recjax infer --kind field_tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import Module, Rngs, param
from recjax.core.rows import take_rows
from recjax.nn.embed import lookup
from recjax.nn.field_vectors import FieldShape
from recjax.nn.norm import unit

_CUTOFF = 10


class Unit:
    """A table whose rows are taken at Euclidean length 1."""

    def __init__(self, table: Float[Array, "v d"]) -> None:
        self.table = table

    def rows(self, ids: Int[Array, " n"]) -> Float[Array, "n d"]:
        """Vectors of rows that all devices ask for."""
        return unit(take_rows(self.table, ids, by_batch=False)[0])


class PairTables(Module):
    """`logit/<head>` [b] = <u, v> / `temperature` of the unit vectors of the fields `user` and `item`.

    Beside it `user` and `item` [b, d] and `table`, where those of other items are found. When evaluated, `row/nll` [b]
    is the negative log-likelihood of the item among all with a count in the fact `item/count`, in nats, and
    `row/recall@10` whether it is among the best ten.
    """

    max_length = None

    def __init__(
        self,
        *,
        num_rows: int,
        fields: Sequence[FieldShape],
        width: int = 16,
        user: str = "user_id",
        item: str = "item_id",
        head: str = "click",
        temperature: float = 0.1,
        table_scale: float = 1e-1,
        rngs: Rngs,
    ) -> None:
        known = [f.name for f in fields if f.kind == "categorical"]
        if missing := [name for name in (user, item) if name not in known]:
            raise ConfigError(f"no field {', '.join(missing)} of single values", expected=", ".join(known))
        self.names, self.head, self.temperature, self.table_width = (user, item), head, temperature, width
        self.table = param(rngs, (num_rows, width), ("items", None), nnx.initializers.normal(table_scale))

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, Any]:
        """Reads `field/<user>` and `field/<item>`; draws nothing."""
        table, ids = self.table[...], jnp.stack([batch[f"field/{name}"] for name in self.names], axis=1)
        user, item = jnp.split(unit(lookup(table, ids)), 2, axis=1)
        user, item = user[:, 0], item[:, 0]
        logit = (user * item).sum(1) / self.temperature
        out = {f"logit/{self.head}": logit, "user": user, "item": item, "table": Unit(table)}
        if train or "item/count" not in batch:
            return out
        scores = user @ unit(table).T / self.temperature
        scores = jnp.where(batch["item/count"][None] > 0, scores, -jnp.inf)
        before = (scores > logit[:, None]).sum(1)
        return out | {
            "row/nll": jax.nn.logsumexp(scores, axis=1) - logit,
            f"row/recall@{_CUTOFF}": (before < _CUTOFF).astype(jnp.float32),
        }

    def token_flops(self, length: int) -> TokenFlops:
        """Training FLOPs of one row: there is nothing but looking up."""
        return per_token(parameters=2 * self.table_width, layers=0, length=length, width=0, rows=0)
