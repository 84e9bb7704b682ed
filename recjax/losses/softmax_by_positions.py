"""Catalogue softmax cut into chunks of positions, with the gradients made beside the value.

For each chunk the logits are made once and used three times: three matrix products instead of the four that
recomputation needs. Exponentials are never normalised; the sums divide the small factors instead. Positions of weight
0 are sorted to the end and never computed. Runs on one device or inside the island that `recjax.losses.softmax` opens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.rows import Split

FEWEST_POSITIONS = 64
LOWEST = np.float32(-3e38)


def value(elements: int, z_loss: float, split: Split | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Loss with and without the z term, summed over all positions."""
    return _compute(elements, z_loss, split, *arrays, gradients=False)[:2]


def value_and_gradients(elements: int, z_loss: float, split: Split | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The two sums, and the gradient of the first with respect to hidden vectors and table."""
    return _compute(elements, z_loss, split, *arrays, gradients=True)


def _compute(
    elements: int,
    z_loss: float,
    split: Split | None,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    valid: jax.Array,
    *,
    gradients: bool,
) -> tuple[jax.Array, ...]:
    shape, width = hidden.shape, hidden.shape[-1]
    if split is not None:
        hidden, targets, weight = (split.gather(x) for x in (hidden, targets, weight))
    gathered = hidden.shape
    hidden, targets, weight = hidden.reshape(-1, width), targets.reshape(-1), weight.reshape(-1)
    count, rows = weight.shape[0], table.shape[0]
    inside = jnp.ones(targets.shape, bool)
    if split is not None:
        targets, inside = split.local_rows(targets, rows)
    axes = () if split is None else split.items
    # Rows that are not valid repeat a valid one: they cannot set the maximum, and only the exponentials need a mask.
    any_valid = valid.any()
    matrix = jnp.where(valid[:, None], table, table[jnp.argmax(valid)][None]).astype(hidden.dtype)

    size = _chunk_size(count, max(FEWEST_POSITIONS, elements // rows))
    order = jnp.argsort(weight == 0, stable=True)
    order = jnp.pad(order, (0, -count % size), constant_values=count)
    chunks = (jnp.count_nonzero(weight) + size - 1) // size

    def total_over(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, axes) if axes else x

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss, nll, d_hidden, d_table = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        h, y = jnp.take(hidden, at, 0, mode="clip"), jnp.take(targets, at, mode="clip")
        w = jnp.where(at < count, jnp.take(weight, at, mode="clip"), 0)
        here = jnp.take(inside, at, mode="clip")
        target_rows = jnp.where(here[:, None], jnp.take(table, y, 0, mode="clip"), 0)

        logits = jnp.dot(h, matrix.T, preferred_element_type=jnp.float32)
        top = jnp.where(any_valid, logits.max(-1), LOWEST)
        top = jax.lax.pmax(top, axes) if axes else top
        exps = jnp.where(valid[None], jnp.exp(logits - top[:, None]), 0)
        target = (h.astype(jnp.float32) * target_rows).sum(-1)
        sums, target = total_over(jnp.stack([exps.sum(-1), target]))
        log_sum = jnp.log(sums) + top
        nll += ((log_sum - target) * w).sum()
        loss += ((log_sum - target + z_loss * jnp.square(log_sum)) * w).sum()
        if not gradients:
            return loss, nll, d_hidden, d_table
        factor = (w * (1 + 2 * z_loss * log_sum) / sums)[:, None]
        exps = exps.astype(h.dtype)
        dh = factor * jnp.dot(exps, matrix, preferred_element_type=jnp.float32) - w[:, None] * target_rows
        d_hidden = d_hidden.at[at].set(dh, mode="drop", unique_indices=True)
        scaled = (factor * h).astype(h.dtype)
        d_table = d_table + jnp.dot(jax.lax.optimization_barrier(scaled.T), exps, preferred_element_type=jnp.float32)
        return loss, nll, d_hidden, d_table

    zero = jnp.float32(0)
    start = (zero, zero, jnp.zeros((count, width), jnp.float32), jnp.zeros((width, rows), jnp.float32))
    if not gradients:
        start = (zero, zero, zero, zero)
    loss, nll, d_hidden, d_table = jax.lax.fori_loop(0, chunks, body, start)
    if split is not None and split.batch_only:
        # Devices along the shared axes hold the same positions after the gather, so these axes are not summed over.
        loss, nll = (jax.lax.psum(x, split.batch_only) for x in (loss, nll))
    if not gradients:
        return loss, nll
    at = jnp.where(inside, targets, rows)
    d_table = d_table.T.at[at].add(-weight[:, None] * hidden.astype(jnp.float32), mode="drop")
    d_hidden = d_hidden.reshape(gathered)
    if split is not None:
        d_hidden = split.scatter_sum(d_hidden)
        d_table = jax.lax.psum(d_table, split.batch_only) if split.batch_only else d_table
    return loss, nll, d_hidden.reshape(shape).astype(hidden.dtype), d_table


def _chunk_size(count: int, most: int) -> int:
    """Chunks of equal size, a multiple of 8 and about `most`."""
    chunks = -(-count // most)
    return -(-count // chunks // 8) * 8
