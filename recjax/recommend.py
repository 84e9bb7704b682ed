"""From prompts to recommendations, as one pure function of the parameters.

`infer` runs it over a task and `export` freezes it into a bundle, so that what is served is what was measured. A prompt
is a row of the model's table for each slot: the items of a history, or the tokens that spell them or a query. Items are
found through `recjax.retrieve`, as in evaluation. A model is told the prompts and, where the recipe feeds times, those
of the events and that of the question; one that reads anything else from its batch is refused with the name of the
field.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recjax.core.module import Functional, Params
from recjax.data.batch import PAD
from recjax.retrieve import Answers, Catalogue, Rows

Recommend = Callable[..., Answers]
# What a model is told besides the items, by the `times` of its feed: names of the arrays in order.
TIMES = {"none": (), "history": ("history_time",), "target": ("history_time", "query_time")}


def batch_of(prompt_ids: jax.Array, *times: jax.Array) -> dict[str, jax.Array]:
    """The batch in which a model is asked what comes after each of some prompts.

    `prompt_ids` int [b, l] is padded on the right. `times`, in seconds, are those of the events [b, l] and that of the
    question [b], as far as the model reads them. `query_at` is -1 for an empty prompt, whose query is zero, as in
    `recjax.evaluation`: all items then score alike.
    """
    real = prompt_ids != PAD
    places = jnp.arange(prompt_ids.shape[1], dtype=jnp.int32)
    length = jnp.sum(real, axis=1, dtype=jnp.int32)
    batch = {
        "history_ids": prompt_ids,
        "positions": jnp.where(real, places[None, :], 0),
        "segment_ids": real.astype(jnp.int32),
        "query_at": length[:, None] - 1,
    }
    if times:
        batch["history_time"] = jnp.where(real, times[0], 0)
    if len(times) > 1:
        following = jnp.roll(batch["history_time"], -1, axis=1)
        is_last = places[None, :] == length[:, None] - 1
        batch["query_time"] = jnp.where(is_last, times[1][:, None], jnp.where(real, following, 0))
    return batch


def make_recommend(model: Functional, *, num_items: int, k: int, catalogue: Catalogue | None = None) -> Recommend:
    """`recommend(params, prompt_ids [b, l], seen_ids [b, n], *times, allowed=None) -> (scores [b, k], rows [b, k])`.

    `prompt_ids` and `times` as in `batch_of`; the best item is first. Item rows in `seen_ids` (0 is padding), and those
    that are not `allowed` (bool [b, v]), are left out; where fewer than `k` items remain the row is 0 and the score
    -inf. Without a `catalogue` the prompts are scored against the rows of the items.
    """
    search = catalogue or Rows(num_items)

    def recommend(
        params: Params,
        prompt_ids: jax.Array,
        seen_ids: jax.Array,
        *times: jax.Array,
        allowed: jax.Array | None = None,
    ) -> Answers:
        return search(model, params, batch_of(prompt_ids, *times), k, exclude=seen_ids, allowed=allowed)

    return recommend
