"""Scores of queries against a table of items, a block of the table at a time.

Scores are inner products in float32 at full precision. What they are used for is elsewhere (`recjax.index.exact`
ranks by them); here is also the one number that needs all of them and no order, `log_partition`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from recjax.core import sharding
from recjax.core.rows import take_rows

BLOCK = 16384
LOWEST = float(jnp.finfo(jnp.float32).min)  # the score of what scored less, or not a number


def log_partition(
    queries: Float[Array, "b d"], table: Float[Array, "*q v d"], *, valid: Bool[Array, " v"], block: int = BLOCK
) -> Float[Array, " b"]:
    """log of the sum of exp(score) over all `valid` rows, none removed: what a softmax over the catalogue divides by.

    With the score s of an item, its negative log-likelihood in nats is `log_partition - s`.
    """
    mesh = sharding.active()
    run, items = partial(_partition_shard, block=block), ()
    if mesh is not None:
        items = items_axes(mesh, table)
        by_batch, by_items = P(mesh.axes_of("batch") or None), P(items or None)
        by_table = by_items if table.ndim == 2 else by_batch
        shared = tuple(axis for axis in mesh.axes_of("batch") if axis in items)
        run = jax.shard_map(
            partial(run, items=items, shared=shared),
            mesh=mesh.devices,
            in_specs=(by_batch, by_table, by_items),
            out_specs=by_batch,
            check_vma=False,  # equal on the axes that are left out, by the sums below
        )
    return run(queries, table, valid)


def scores_of(
    queries: Float[Array, "b d"], table: Float[Array, "*q v d"], rows: Int[Array, "b n"]
) -> Float[Array, "b n"]:
    """Scores of some rows for each query, as `top_k` makes them."""
    found = take_rows(table, rows)[0] if table.ndim == 2 else jnp.take_along_axis(table, rows[..., None], axis=1)
    scores = jnp.einsum(
        "bd,bnd->bn", queries, found, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return bounded(scores)


def items_axes(mesh, table) -> tuple[str, ...]:
    """Mesh axes over which the rows of a table are split; a table of each query's own lies with its query."""
    return mesh.axes_of("items") if table.ndim == 2 else ()


def _partition_shard(queries, table, valid, *, block, items=(), shared=()):
    mine = queries.shape[0]
    if shared:
        queries = jax.lax.all_gather(queries, shared, axis=0, tiled=True)
    v = table.shape[-2]
    block = min(block, v)
    blocks = -(-v // block)

    def add(carry, i):
        highest, total = carry
        scores, rows = score_block(queries, table, i, block)
        alive = jax.lax.dynamic_slice_in_dim(valid, rows[0], block) & (rows >= i * block)
        scores = jnp.where(alive, scores, -jnp.inf)
        top = jnp.maximum(highest, jnp.max(scores, axis=1))
        return (top, total * jnp.exp(highest - top) + jnp.sum(jnp.exp(scores - top[:, None]), axis=1)), None

    carry = (jnp.full(len(queries), LOWEST), jnp.zeros(len(queries)))
    highest, total = fold(add, carry, blocks)
    if items:
        top = jax.lax.pmax(highest, items)
        highest, total = top, jax.lax.psum(total * jnp.exp(highest - top), items)
    found = highest + jnp.log(total)
    if shared:
        found = jax.lax.dynamic_slice_in_dim(found, jax.lax.axis_index(shared) * mine, mine)
    return found


def score_block(queries, table, i, block):
    """Scores of block `i` of the table and its rows; the last block overlaps the one before it."""
    start = jnp.minimum(i * block, table.shape[-2] - block)
    part = jax.lax.dynamic_slice_in_dim(table, start, block, axis=table.ndim - 2)
    scores = jnp.einsum(
        "bd,vd->bv" if table.ndim == 2 else "bd,bvd->bv",
        queries,
        part,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores, start + jnp.arange(block)


def fold(step, carry, steps):
    """A scan without stacked outputs; a single step is written out, so that both passes share its scores."""
    return step(carry, 0)[0] if steps == 1 else jax.lax.scan(step, carry, jnp.arange(steps))[0]


def bounded(scores):
    """What is not a number, or less than every finite number, becomes the lowest one."""
    return jnp.where(jnp.isnan(scores), LOWEST, jnp.maximum(scores, LOWEST))
