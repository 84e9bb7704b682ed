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
    inside = jnp.ones(targets.shape, bool)
    if split is not None:
        hidden, targets, weight = (split.gather(x) for x in (hidden, targets, weight))
        targets, inside = split.local_rows(targets, table.shape[0])
    gathered = hidden.shape
    hidden, targets, inside, weight = hidden.reshape(-1, width), targets.ravel(), inside.ravel(), weight.ravel()
    axes = () if split is None else split.items
    target_rows = jnp.where(inside[:, None], jnp.take(table, targets, 0, mode="clip"), 0)
    target = jnp.einsum("nd,nd->n", hidden.astype(jnp.float32), target_rows)
    target = jax.lax.psum(target, axes) if axes else target

    # Positions of weight 0 go to the end, where no chunk comes.
    order = jnp.argsort(weight == 0, stable=True)
    sums = _chunked(elements, z_loss, axes, hidden[order], weight[order], table, valid, gradients=gradients)
    log_sum, *parts = (jnp.zeros_like(x).at[order].set(x, unique_indices=True) for x in sums[:2])
    nll = ((log_sum - target) * weight).sum()
    loss = nll + z_loss * (jnp.square(log_sum) * weight).sum()
    if split is not None and split.batch_only:
        # Devices along the shared axes hold the same positions after the gather, so these axes are not summed over.
        loss, nll = (jax.lax.psum(x, split.batch_only) for x in (loss, nll))
    if not gradients:
        return loss, nll

    d_hidden = (parts[0] - weight[:, None] * target_rows).reshape(gathered)
    at = jnp.where(inside, targets, table.shape[0])
    d_table = sums[2].at[at].add(-weight[:, None] * hidden.astype(jnp.float32), mode="drop")
    if split is not None:
        d_hidden = split.scatter_sum(d_hidden)
        d_table = jax.lax.psum(d_table, split.batch_only) if split.batch_only else d_table
    return loss, nll, d_hidden.reshape(shape).astype(hidden.dtype), d_table


def _chunked(
    elements: int,
    z_loss: float,
    axes: tuple[str, ...],
    hidden: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    valid: jax.Array,
    *,
    gradients: bool,
) -> tuple[jax.Array, ...]:
    """Logsumexp of each position, and the gradients that the logsumexp terms have, up to the last real position."""
    (count, width), rows = hidden.shape, table.shape[0]
    # Rows that are not valid repeat a valid one: they cannot set the maximum, and only the exponentials need a mask.
    any_valid = valid.any()
    matrix = jnp.where(valid[:, None], table, table[jnp.argmax(valid)][None]).astype(hidden.dtype)
    size = _chunk_size(count, max(FEWEST_POSITIONS, elements // rows))
    padding = -count % size
    hidden, weight = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(weight, (0, padding))

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, w = (jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (hidden, weight))
        logits = jnp.dot(h, matrix.T, preferred_element_type=jnp.float32)
        top = jnp.where(any_valid, logits.max(-1), LOWEST)
        top = jax.lax.pmax(top, axes) if axes else top
        exps = jnp.where(valid[None], jnp.exp(logits - top[:, None]), 0)
        sums = exps.sum(-1)
        sums = jax.lax.psum(sums, axes) if axes else sums
        log_sum = jnp.log(sums) + top
        log_sums = jax.lax.dynamic_update_slice_in_dim(carry[0], log_sum, i * size, 0)
        if not gradients:
            return (log_sums,)
        factor = (w * (1 + 2 * z_loss * log_sum) / sums)[:, None]
        exps = exps.astype(h.dtype)
        dh = factor * jnp.dot(exps, matrix, preferred_element_type=jnp.float32)
        # The small transpose is made, not folded into the product: products of plain layouts are the fast ones on CPU.
        scaled = jax.lax.optimization_barrier((factor * h).astype(h.dtype).T)
        d_table = carry[2] + jnp.dot(scaled, exps, preferred_element_type=jnp.float32)
        return log_sums, jax.lax.dynamic_update_slice_in_dim(carry[1], dh, i * size, 0), d_table

    start = (jnp.zeros(count + padding, jnp.float32),)
    if gradients:
        start += (jnp.zeros((count + padding, width), jnp.float32), jnp.zeros((width, rows), jnp.float32))
    chunks = (jnp.count_nonzero(weight) + size - 1) // size
    log_sums, *d = jax.lax.fori_loop(0, chunks, body, start)
    return (log_sums[:count], d[0][:count], d[1].T) if gradients else (log_sums[:count],)


def _chunk_size(count: int, about: int) -> int:
    """The divisor of `count` nearest to `about`; where none is near, about that, and the last chunk is padded."""
    if count <= about:
        return count
    divisors = [size for size in range(about // 2, 2 * about) if count % size == 0]
    return min(divisors, key=lambda size: abs(size - about)) if divisors else -(-count // -(-count // about))
