"""From histories to recommendations, as one pure function of the parameters.

`infer` runs it over a task and `export` freezes it into a bundle, so that what is served is what was measured: the
model's `hidden` at the last event of each history, scored against the model's own table by the exact search of
`recjax.index.exact`. It knows models by the contract alone (`hidden`, `table`) and takes history ids only: a model
that reads anything else from its batch is refused with the name of the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recjax.core.errors import UnservableError
from recjax.core.module import Functional, Params
from recjax.data.batch import FIELDS, PAD
from recjax.data.vocab import FIRST_ITEM
from recjax.index.exact import top_k

Recommend = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def encode(model: Functional, params: Params, history_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """User vectors float32 [b, d] and the item table [v, d] they are scored against.

    `history_ids` int [b, l] is padded on the right. The vector is the model's output at the last event, and zero for
    a row without events, as in `recjax.evaluation`: all items then score alike.
    """
    real = history_ids != PAD
    places = jnp.arange(history_ids.shape[1], dtype=jnp.int32)
    batch = {
        "history_ids": history_ids,
        "positions": jnp.where(real, places[None, :], 0),
        "segment_ids": real.astype(jnp.int32),
    }
    try:
        out = model.apply(params, batch, train=False, key=None)
    except KeyError as error:
        if error.args[0] not in FIELDS:
            raise
        raise UnservableError(
            f"the model reads {error} from its batch",
            expected="a model that reads history_ids, positions and segment_ids only",
            mend="recommendations from histories with other fields are not supported",
        ) from error
    events = jnp.sum(real, axis=1)
    last = jnp.maximum(events - 1, 0)[:, None, None]
    users = jnp.take_along_axis(out["hidden"], last, axis=1)[:, 0].astype(jnp.float32)
    if out["table"].ndim != 2:
        raise UnservableError("the model has other item vectors for every user", expected="one table for all")
    return jnp.where((events > 0)[:, None], users, 0.0), out["table"]


def make_recommend(model: Functional, *, num_items: int, k: int) -> Recommend:
    """`recommend(params, history_ids [b, l], seen_ids [b, n]) -> (scores [b, k], rows [b, k])`, best first.

    Rows in `seen_ids` are left out (0 is padding); where fewer than `k` items remain the row is 0 and the score -inf.
    """

    def recommend(params: Params, history_ids: jax.Array, seen_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        users, table = encode(model, params, history_ids)
        rows = jnp.arange(table.shape[0])
        valid = (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + num_items)
        return top_k(users, table, k, valid=valid, exclude_ids=seen_ids)

    return recommend
