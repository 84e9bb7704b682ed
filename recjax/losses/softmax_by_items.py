"""Catalogue softmax cut into chunks of items, for catalogues whose logits for a few positions are already many.

The forward pass runs once over the table with a running maximum (as FlashAttention does over keys; Dao et al. 2022)
and makes the value and the gradient of the hidden vectors; the backward pass runs over it once more and writes the
table's gradient chunk by chunk into its place. Beside that gradient nothing has the size of the catalogue. Runs on
one device or inside the island that `recjax.losses.softmax` opens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.rows import Split

EXCLUDED = np.float32(-np.inf)
LOWEST = np.float32(-3e38)


class _Block(NamedTuple):
    """Flat hidden vectors, targets and weights against this device's rows of the table."""

    hidden: jax.Array
    targets: jax.Array
    inside: jax.Array
    weight: jax.Array
    table: jax.Array
    valid: jax.Array
    size: int

    def logits(self, i: jax.Array, *, repeat: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First row, rows and logits of chunk `i`; the last chunk overlaps the one before unless `size` divides.

        Logits of rows that are not valid are minus infinity, and unless `repeat` those of rows seen before.
        """
        rows = self.table.shape[0]
        start = jnp.minimum(i * self.size, rows - self.size)
        matrix = jax.lax.dynamic_slice_in_dim(self.table, start, self.size).astype(self.hidden.dtype)
        valid = jax.lax.dynamic_slice_in_dim(self.valid, start, self.size)
        if not repeat and rows % self.size:
            valid &= start + jnp.arange(self.size) >= i * self.size
        logits = jnp.dot(self.hidden, matrix.T, preferred_element_type=jnp.float32)
        return start, matrix, jnp.where(valid[None], logits, EXCLUDED)

    @property
    def chunks(self) -> int:
        return -(-self.table.shape[0] // self.size)


def _block(
    elements: int,
    split: Split | None,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    valid: jax.Array,
) -> _Block:
    inside = jnp.ones(targets.shape, bool)
    if split is not None:
        hidden, targets, weight = (split.gather(x) for x in (hidden, targets, weight))
        targets, inside = split.local_rows(targets, table.shape[0])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    size = min(table.shape[0], max(128, elements // hidden.shape[0] // 128 * 128))
    return _Block(hidden, targets.reshape(-1), inside.reshape(-1), weight.reshape(-1), table, valid, size)


def value(elements: int, z_loss: float, split: Split | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Loss with and without the z term, summed over all positions."""
    return value_and_hidden_gradient(elements, z_loss, split, *arrays)[:2]


def value_and_hidden_gradient(
    elements: int, z_loss: float, split: Split | None, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """The two sums, the gradient of the first with respect to hidden vectors, and the logsumexp of each position."""
    shape = arrays[0].shape
    block = _block(elements, split, *arrays)
    count, width = block.hidden.shape

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, sums, mixed = carry
        _, matrix, logits = block.logits(i, repeat=False)
        higher = jnp.maximum(top, logits.max(-1))
        exps = jnp.exp(logits - higher[:, None])
        shrink = jnp.exp(top - higher)
        sums = sums * shrink + exps.sum(-1)
        product = jnp.dot(exps.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)
        return higher, sums, mixed * shrink[:, None] + product

    # Low but finite: the difference of two infinities is not a number.
    start = (jnp.full(count, LOWEST), jnp.zeros(count), jnp.zeros((count, width)))
    top, sums, mixed = jax.lax.fori_loop(0, block.chunks, body, start)
    target_rows = jnp.where(block.inside[:, None], jnp.take(block.table, block.targets, 0, mode="clip"), 0)
    target = (block.hidden.astype(jnp.float32) * target_rows).sum(-1)
    if split is not None and split.items:
        highest = jax.lax.pmax(top, split.items)
        shrink = jnp.exp(top - highest)
        top, mixed = highest, mixed * shrink[:, None]
        sums, target = jax.lax.psum(jnp.stack([sums * shrink, target]), split.items)
    log_sum, w = jnp.log(sums) + top, block.weight
    nll = ((log_sum - target) * w).sum()
    loss = nll + z_loss * (jnp.square(log_sum) * w).sum()
    factor = w * (1 + 2 * z_loss * log_sum) / sums
    d_hidden = factor[:, None] * mixed - w[:, None] * target_rows
    d_hidden, log_sum = d_hidden.reshape(-1, *shape[1:]), log_sum.reshape(-1, *shape[1:-1])
    if split is not None:
        if split.batch_only:
            loss, nll = (jax.lax.psum(x, split.batch_only) for x in (loss, nll))
        d_hidden, log_sum = split.scatter_sum(d_hidden), split.own_part(log_sum)
    return loss, nll, d_hidden.astype(arrays[0].dtype), log_sum


def table_gradient(
    elements: int, z_loss: float, split: Split | None, *arrays_and_log_sum: jax.Array
) -> tuple[jax.Array]:
    """Gradient with respect to the table, given the logsumexp of each position."""
    *arrays, log_sum = arrays_and_log_sum
    block = _block(elements, split, *arrays)
    log_sum = (log_sum if split is None else split.gather(log_sum)).reshape(-1)
    scaled = (block.weight * (1 + 2 * z_loss * log_sum))[:, None] * block.hidden
    scaled = scaled.astype(block.hidden.dtype)

    def body(i: jax.Array, d_table: jax.Array) -> jax.Array:
        start, _, logits = block.logits(i, repeat=True)
        chances = jnp.exp(logits - log_sum[:, None]).astype(scaled.dtype)
        rows = jnp.dot(chances.T, scaled, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(d_table, rows, start, 0)

    d_table = jax.lax.fori_loop(0, block.chunks, body, jnp.zeros(block.table.shape, jnp.float32))
    at = jnp.where(block.inside, block.targets, block.table.shape[0])
    d_table = d_table.at[at].add(-block.weight[:, None] * block.hidden.astype(jnp.float32), mode="drop")
    if split is not None and split.batch_only:
        d_table = jax.lax.psum(d_table, split.batch_only)
    return (d_table,)
