"""A trained model's ranked list for every event of the training split, for students to learn from.

Each list is made from the events before its own, and never from the event itself or later ones; items that the user
had by then are left out of it, unless asked for. `recjax.data.teacher` says what the artifact looks like.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.batch import PAD
from recjax.data.examples import Examples
from recjax.data.teacher import open_rankings
from recjax.data.vocab import FIRST_ITEM
from recjax.index.exact import top_k

_READ_AT_ONCE = 8192


def write_rankings(
    model: Functional,
    params: Params,
    examples: Examples,
    *,
    out: str | os.PathLike[str],
    history_length: int,
    k: int = 20,
    exclude_seen: bool = True,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    recipe: str = "",
    step: int = 0,
) -> Path:
    """Write an artifact of kind `teacher_rankings` at `out`: the `k` best items of each training event but the first.

    The model must be causal and see at most `history_length` events. A user with more is read in windows that overlap
    by half, and each event is taken from the window where it has more before it. `distance` is the best item's score
    less that of the item, so the confidence of DLLM2Rec is a softmax of scores.
    """
    k = min(k, examples.vocab.num_items)
    run = jax.jit(lambda params, batch: _lists(model, params, batch, examples.vocab.num_items, k, exclude_seen))
    parts = mesh.size_of("batch") if mesh else 1
    batch_size = -(-batch_size // parts) * parts
    with open_rankings(out, examples, recipe=recipe, step=step) as writer:
        for users, first, kept, ids in _windows(examples, history_length, batch_size):
            real = ids != PAD
            places = np.where(real, np.arange(ids.shape[1], dtype=np.int32), 0).astype(np.int32)
            batch = {"history_ids": ids, "positions": places, "segment_ids": real.astype(np.int32)}
            rows, distance = (np.asarray(x) for x in run(params, mesh.put_batch(batch) if mesh else batch))
            at = np.nonzero(kept)
            writer.add(users[at[0]], (first[:, None] + np.arange(ids.shape[1]) + 1)[at], rows[at], distance[at])
    return Path(out)


def _lists(
    model: Functional, params: Params, batch: dict[str, Any], num_items: int, k: int, exclude_seen: bool
) -> tuple[jax.Array, jax.Array]:
    """Rows and distances [b, l, k] of what comes after each slot."""
    out, ids = model.apply(params, batch, train=False, key=None), batch["history_ids"]
    (count, length), row = ids.shape, jnp.arange(out["table"].shape[-2])
    seen = None
    if exclude_seen:  # slot l may not rank what is in the slots up to l
        seen = jnp.where(jnp.tril(jnp.ones((length, length), bool)), ids[:, None], PAD).reshape(-1, length)
    scores, rows = top_k(
        out["hidden"].reshape(count * length, -1),
        out["table"],
        k,
        valid=(row >= FIRST_ITEM) & (row < FIRST_ITEM + num_items),
        exclude_ids=seen,
    )
    distance = jnp.where(jnp.isfinite(scores), scores[:, :1] - scores, 0)
    return rows.reshape(count, length, k), distance.reshape(count, length, k)


def _windows(
    examples: Examples, limit: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """User numbers and first events [b], which slots to keep [b, l], and item rows [b, l] of `batch_size` windows."""
    source = examples.source("train")
    waiting: list[tuple[int, int, int, np.ndarray]] = []
    for some in np.split(np.arange(len(source)), range(_READ_AT_ONCE, len(source), _READ_AT_ONCE)):
        read = source.read(some, ("user_index", "items"))
        (users, at), (items, begins) = read["user_index"], read["items"]
        for user, begin, length in zip(users[at], begins, source.lengths[some].tolist(), strict=True):
            start, done = 0, 0
            while done < length - 1:
                end = min(start + limit, length - 1)
                waiting.append((int(user), start, done - start, items[begin + start : begin + end]))
                start, done = start + max(limit // 2, 1), end
                if len(waiting) == batch_size:
                    yield _batch(waiting, limit, batch_size)
                    waiting = []
    if waiting:
        yield _batch(waiting, limit, batch_size)


def _batch(
    windows: list[tuple[int, int, int, np.ndarray]], limit: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    users, first = np.zeros(batch_size, np.int64), np.zeros(batch_size, np.int64)
    kept, ids = np.zeros((batch_size, limit), bool), np.zeros((batch_size, limit), np.int32)
    for i, (user, start, new, items) in enumerate(windows):
        users[i], first[i] = user, start
        ids[i, : len(items)] = items
        kept[i, new : len(items)] = True
    return users, first, kept, ids
