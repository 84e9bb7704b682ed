"""Exact search over the whole catalogue: the best k rows, and the place of one row among all of them.

Scores are inner products in float32 at full precision. The order is always (score descending, row ascending), so
equal scores never depend on block size, device count or library, and a collapsed model that scores every item alike
ranks a target by its row, not first. Scores are made block by block: nothing larger than [b, block] exists. Under
an active mesh the search is a `shard_map` island: every device searches its own table rows and only k candidates
and one count per query travel. This module refuses to approximate, and knows no model: serving uses it as the oracle.

A table may be [b, v, d]: item vectors of each query's own, as where they depend on the time it is asked at. Then the
table is split with the queries, never by items.

Removal: a row is a candidate when `valid[row]` (a query's own, where `valid` is [b, v]) and when it is not among the
query's `exclude_ids` (0 is padding). A target is never removed, even when it stands in `exclude_ids` (a repeated item),
so it always has a rank. A score that is not a number counts as the lowest finite score: such items come last, in row
order.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from recjax.core import sharding
from recjax.index.scoring import BLOCK, bounded, fold, items_axes, score_block, scores_of

MISS = 2**31 - 1  # the rank of a target that is no candidate at all (not a valid row)
_REMOVED = -jnp.inf


class Found(NamedTuple):
    """Best `k` rows with their scores (row 0, score -inf past the last candidate); rank and score of the target."""

    scores: Float[Array, "b k"]
    rows: Int[Array, "b k"]
    rank: Int[Array, " b"]
    label_scores: Float[Array, " b"]


def top_k(
    queries: Float[Array, "b d"],
    table: Float[Array, "*q v d"],
    k: int,
    *,
    valid: Bool[Array, "*b v"],
    exclude_ids: Int[Array, "b n"] | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The `k` best candidates of every query, best first; row 0 with score -inf where there are fewer than `k`."""
    found = _search(queries, table, None, k, valid, exclude_ids, block)
    return found.scores, found.rows


def rank_of(
    queries: Float[Array, "b d"],
    table: Float[Array, "*q v d"],
    label_ids: Int[Array, " b"],
    *,
    valid: Bool[Array, "*b v"],
    exclude_ids: Int[Array, "b n"] | None = None,
    block: int = BLOCK,
) -> Int[Array, " b"]:
    """How many candidates come before `label_ids` (0 is first); `MISS` where the label is not a valid row."""
    return _search(queries, table, label_ids, 0, valid, exclude_ids, block).rank


def rank_and_top_k(
    queries: Float[Array, "b d"],
    table: Float[Array, "*q v d"],
    label_ids: Int[Array, " b"],
    k: int,
    *,
    valid: Bool[Array, "*b v"],
    exclude_ids: Int[Array, "b n"] | None = None,
    block: int = BLOCK,
) -> Found:
    """`rank_of` and `top_k` together; one pass over a table of at most `block` rows, two over a larger one."""
    return _search(queries, table, label_ids, k, valid, exclude_ids, block)


def rank_scores(
    scores: Float[Array, "b v"],
    label_ids: Int[Array, " b"],
    k: int,
    *,
    valid: Bool[Array, "*b v"],
    exclude_ids: Int[Array, "b n"] | None = None,
) -> Found:
    """`rank_and_top_k` for scores that are there already, by the same rules (baselines go through this)."""
    exclude = _spare(_or_empty(exclude_ids, scores.shape[0]), label_ids)
    candidates = _remove(scores.astype(jnp.float32), jnp.atleast_2d(valid), exclude)
    best, rows = jax.lax.top_k(candidates, k)
    label_scores = _pick(candidates, label_ids, jnp.arange(scores.shape[1]))
    rank = _count_before(candidates, jnp.arange(scores.shape[1]), label_scores, label_ids)
    return _finish(best, rows, rank, label_scores)


def rank_among(
    queries: Float[Array, "b d"],
    table: Float[Array, "*q v d"],
    label_ids: Int[Array, " b"],
    candidate_ids: Int[Array, "b n"],
) -> Int[Array, " b"]:
    """The place of the label among itself and its query's candidates (0 is padding), by the same order."""
    scores = scores_of(queries, table, jnp.concatenate([label_ids[:, None], candidate_ids], axis=1))
    return place_among(scores, label_ids, candidate_ids)


def place_among(
    scores: Float[Array, "b n1"], label_ids: Int[Array, " b"], candidate_ids: Int[Array, "b n"]
) -> Int[Array, " b"]:
    """`rank_among` from the scores of the label (first) and of its candidates."""
    label, others = scores[:, :1], jnp.where(candidate_ids == 0, _REMOVED, scores[:, 1:])
    return _count_before(others, candidate_ids, label[:, 0], label_ids)


def _search(queries, table, label_ids, k, valid, exclude_ids, block) -> Found:
    if k > table.shape[-2]:
        raise ValueError(f"k = {k} is more than the {table.shape[-2]} rows of the table")
    exclude = _or_empty(exclude_ids, queries.shape[0])
    labels = jnp.full(queries.shape[0], -1, jnp.int32) if label_ids is None else label_ids.astype(jnp.int32)
    if label_ids is not None:
        exclude = _spare(exclude, labels)
    mesh = sharding.active()
    items = items_axes(mesh, table) if mesh else ()
    batch = mesh.axes_of("batch") if mesh else ()
    shared = tuple(axis for axis in batch if axis in items)
    run = partial(_search_shard, k=k, block=block, ranking=label_ids is not None, items=items, shared=shared)
    if mesh is not None:
        by_batch, by_items = P(batch or None), P(items or None)
        by_table = by_items if table.ndim == 2 else by_batch
        by_valid = by_items if valid.ndim == 1 else P(batch or None, items or None)
        run = jax.shard_map(
            run,
            mesh=mesh.devices,
            in_specs=(by_batch, by_table, by_valid, by_batch, by_batch),
            out_specs=by_batch,
            check_vma=False,  # equal on the axes that are left out, by the gathers below
        )
    return run(queries, table, valid, exclude, labels)


def _search_shard(queries, table, valid, exclude, labels, *, k, block, ranking, items, shared) -> Found:
    """What one device does: its own table rows, for the queries of its own replica of the table."""
    mine = queries.shape[0]
    if shared:
        queries, exclude, labels = jax.lax.all_gather((queries, exclude, labels), shared, axis=0, tiled=True)
        valid = jax.lax.all_gather(valid, shared, axis=0, tiled=True) if valid.ndim == 2 else valid
    v = table.shape[-2]
    block = min(block, v)
    blocks = -(-v // block)
    offset = jax.lax.axis_index(items) * v if items else 0

    def candidates_of(i):
        scores, rows = score_block(queries, table, i, block)
        alive = jax.lax.dynamic_slice_in_dim(jnp.atleast_2d(valid), rows[0], block, axis=1)
        alive &= jnp.broadcast_to(rows >= i * block, alive.shape)
        return _remove(scores, alive, exclude - (offset + rows[0])), offset + rows

    def first_pass(carry, i):
        best, best_rows, label_scores = carry
        candidates, rows = candidates_of(i)
        if k:
            new, places = jax.lax.top_k(candidates, min(k, block))
            best, best_rows = _merge(jnp.concatenate([best, new], 1), jnp.concatenate([best_rows, rows[places]], 1), k)
        if ranking:
            label_scores = jnp.maximum(label_scores, _pick(candidates, labels, rows))
        return (best, best_rows, label_scores), None

    def second_pass(count, i):
        candidates, rows = candidates_of(i)
        return count + _count_before(candidates, rows, label_scores, labels), None

    b = queries.shape[0]
    carry = (jnp.full((b, k), _REMOVED), jnp.zeros((b, k), jnp.int32), jnp.full(b, _REMOVED))
    best, best_rows, label_scores = fold(first_pass, carry, blocks)
    if items and k:
        best = jax.lax.all_gather(best, items, axis=1, tiled=True)
        best_rows = jax.lax.all_gather(best_rows, items, axis=1, tiled=True)
        best, best_rows = _merge(best, best_rows, k)
    rank = jnp.zeros(b, jnp.int32)
    if ranking:
        label_scores = jax.lax.pmax(label_scores, items) if items else label_scores
        rank = fold(second_pass, rank, blocks)
        rank = jax.lax.psum(rank, items) if items else rank
    found = _finish(best, best_rows, rank, label_scores)
    if shared:
        here = jax.lax.axis_index(shared) * mine
        found = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, here, mine), found)
    return found


def _remove(scores, valid, places):
    """-inf where not valid ([1, v] or [b, v]) and at `places` [b, n] (outside the block: ignored).

    What is left is finite or +inf.
    """
    scores = jnp.where(valid, bounded(scores), _REMOVED)
    places = jnp.where(places < 0, scores.shape[1], places)  # a negative index would count from the end
    return scores.at[jnp.arange(scores.shape[0])[:, None], places].set(_REMOVED, mode="drop")


def _spare(exclude, labels):
    """The target's own entries of `exclude` become padding."""
    return jnp.where(exclude == labels[:, None], 0, exclude)


def _pick(candidates, labels, rows):
    """The target's score where its row is in this block, else -inf."""
    place = labels - rows[0]
    inside = (place >= 0) & (place < len(rows))
    picked = jnp.take_along_axis(candidates, jnp.clip(place, 0, len(rows) - 1)[:, None], axis=1)[:, 0]
    return jnp.where(inside, picked, _REMOVED)


def _count_before(candidates, rows, label_scores, labels):
    """Candidates that come before the target in the order (score descending, row ascending)."""
    rows = rows if rows.ndim == 2 else rows[None, :]
    tie = (candidates == label_scores[:, None]) & (rows < labels[:, None])
    return jnp.sum((candidates > label_scores[:, None]) | tie, axis=1, dtype=jnp.int32)


def _merge(scores, rows, k):
    """Best `k` of several sorted lists side by side; `top_k` takes the leftmost of equals, and rows grow rightwards."""
    best, places = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(rows, places, axis=1)


def _finish(scores, rows, rank, label_scores) -> Found:
    rows = jnp.where(scores == _REMOVED, 0, rows).astype(jnp.int32)
    return Found(scores, rows, jnp.where(label_scores == _REMOVED, MISS, rank), label_scores)


def _or_empty(exclude_ids, b):
    return jnp.zeros((b, 1), jnp.int32) if exclude_ids is None else exclude_ids.astype(jnp.int32)
