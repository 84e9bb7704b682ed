"""From histories to recommendations, as one pure function of the parameters.

`infer` runs it over a task and `export` freezes it into a bundle, so that what is served is what was measured: the
model's `hidden` at the last event of each history, scored against the model's own table by the exact search of
`recjax.index.exact`. It knows models by the contract alone (`hidden`, `table`) and takes history ids and, where the
recipe feeds times, those of the events and that of the question; a model that reads anything else from its batch is
refused with the name of the field.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recjax.core.errors import UnservableError
from recjax.core.module import Functional, Params
from recjax.data.batch import FIELDS, PAD
from recjax.data.vocab import FIRST_ITEM
from recjax.index.exact import top_k

Recommend = Callable[..., tuple[jax.Array, jax.Array]]
# What a model is told besides the items, by the `times` of its feed: names of the arrays in order.
TIMES = {"none": (), "history": ("history_time",), "target": ("history_time", "query_time")}


def encode(model: Functional, params: Params, history_ids: jax.Array, *times: jax.Array) -> tuple[jax.Array, jax.Array]:
    """User vectors float32 [b, d] and the item table they are scored against: [v, d], or [b, v, d] of each user.

    `history_ids` int [b, l] is padded on the right. `times`, in seconds, are those of the events [b, l] and that of
    the question [b], as far as the model reads them. The vector is the model's output at the last event, and zero
    for a row without events, as in `recjax.evaluation`: all items then score alike.
    """
    real = history_ids != PAD
    places = jnp.arange(history_ids.shape[1], dtype=jnp.int32)
    batch = {
        "history_ids": history_ids,
        "positions": jnp.where(real, places[None, :], 0),
        "segment_ids": real.astype(jnp.int32),
    }
    events = jnp.sum(real, axis=1)
    if times:
        batch["history_time"] = jnp.where(real, times[0], 0)
    if len(times) > 1:
        following = jnp.roll(batch["history_time"], -1, axis=1)
        is_last = places[None, :] == events[:, None] - 1
        batch["query_time"] = jnp.where(is_last, times[1][:, None], jnp.where(real, following, 0))
    try:
        out = model.apply(params, batch, train=False, key=None)
    except KeyError as error:
        if error.args[0] not in FIELDS:
            raise
        raise UnservableError(
            f"the model reads {error} from its batch",
            expected="a model that reads history_ids, positions and segment_ids, and the times that Feed.times gives",
            mend="set Feed.times, or recommend without this model",
        ) from error
    last = jnp.maximum(events - 1, 0)[:, None, None]
    users = jnp.take_along_axis(out["hidden"], last, axis=1)[:, 0].astype(jnp.float32)
    return jnp.where((events > 0)[:, None], users, 0.0), out["table"]


def make_recommend(model: Functional, *, num_items: int, k: int) -> Recommend:
    """`recommend(params, history_ids [b, l], seen_ids [b, n], *times) -> (scores [b, k], rows [b, k])`, best first.

    `times` as in `encode`. Rows in `seen_ids` are left out (0 is padding); where fewer than `k` items remain the row
    is 0 and the score -inf.
    """

    def recommend(
        params: Params, history_ids: jax.Array, seen_ids: jax.Array, *times: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        users, table = encode(model, params, history_ids, *times)
        rows = jnp.arange(table.shape[-2])
        valid = (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + num_items)
        return top_k(users, table, k, valid=valid, exclude_ids=seen_ids)

    return recommend
