"""Products of sorted rows with the matrix of their group: what a mixture of experts spends its time in.

Rows of one expert lie together, and each group meets a matrix of its own, so that no row is dropped or padded however
unequal the groups are. The kernel is a choice of the config and never made silently: `jax.lax.ragged_dot` is for TPU
and GPU and runs everywhere, "megablox" is jax's for TPU (`recjax.nn.megablox`), tokamax has kernels for both, and
"blocks" is for CPU, where XLA writes a ragged product out as a masked one, as large as all groups together for each of
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.nn.kernels import check_device, tokamax
from recjax.nn.linear import transposed
from recjax.nn.megablox import megablox_product

GroupedKernel = Literal["ragged_dot", "megablox", "blocks", "tokamax"]
# Rows that meet a matrix at once in "blocks": a group's last block is computed whole, however little of it is left.
BLOCK = 128


def grouped_product(
    x: Float[Array, "n i"], weights: Float[Array, "e i o"], sizes: Int[Array, " e"], kernel: GroupedKernel
) -> Float[Array, "n o"]:
    """The first `sizes[0]` rows of `x` times `weights[0]`, the next `sizes[1]` times `weights[1]`, and so on.

    Rows past the last group come out as anything at all, and so does their gradient: `rows_of_groups` goes around
    whatever is made of them. Raises `ConfigError` where the kernel is not to be had.
    """
    return _kernel(kernel)(x, weights.astype(x.dtype), sizes)


def rows_of_groups(x: Float[Array, "n d"], sizes: Int[Array, " e"]) -> Float[Array, "n d"]:
    """`x`, and zero past the last group, in the gradient too."""
    inside = jnp.arange(x.shape[0], dtype=sizes.dtype) < sizes.sum()
    return jnp.where(inside[:, None], x, jnp.zeros((), x.dtype))


def _kernel(name: GroupedKernel) -> Callable[..., jax.Array]:
    if name == "ragged_dot":
        return jax.lax.ragged_dot
    if name == "blocks":
        return _by_blocks
    if name == "megablox":
        check_device(name, ("tpu",), where="MoeConfig", instead="blocks")
        return megablox_product
    library, own = tokamax(where="MoeConfig", instead="ragged_dot")
    return functools.partial(library.ragged_dot, implementation=own)


@jax.custom_vjp
def _by_blocks(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """One block after another, in the order of the groups: what a block has of the next group is overwritten by it."""
    padded = _padded(x)

    def body(out: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
        y = _block(padded, start) @ jax.lax.dynamic_index_in_dim(weights, group, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return _over_blocks(sizes, body, jnp.zeros((len(padded), weights.shape[-1]), x.dtype))[: len(x)]


def _by_blocks_forward(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _by_blocks(x, weights, sizes), (x, weights, sizes)


def _by_blocks_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, weights, sizes = residuals
    padded_x, padded_g, ends = _padded(x), _padded(g), jnp.cumsum(sizes)

    def body(total: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
        own = start + jnp.arange(BLOCK, dtype=sizes.dtype) < ends[group]
        rows = jnp.where(own[:, None], _block(padded_g, start), jnp.zeros((), g.dtype))
        part = jnp.matmul(transposed(_block(padded_x, start)), rows, preferred_element_type=jnp.float32)
        return total.at[group].add(part)

    d_weights = _over_blocks(sizes, body, jnp.zeros(weights.shape, jnp.float32))
    return _by_blocks(g, weights.swapaxes(1, 2), sizes), d_weights.astype(weights.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _over_blocks(sizes: jax.Array, body: Callable[..., jax.Array], carry: jax.Array) -> jax.Array:
    """Fold `carry = body(carry, group, first row)` over the blocks of all groups."""
    starts = jnp.cumsum(sizes) - sizes

    def of_group(group: jax.Array, carry: jax.Array) -> jax.Array:
        count = -(-sizes[group] // BLOCK)
        return jax.lax.fori_loop(0, count, lambda i, c: body(c, group, starts[group] + i * BLOCK), carry)

    return jax.lax.fori_loop(0, len(sizes), of_group, carry)


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, BLOCK), (0, 0)))


def _block(x: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK)


@jax.custom_vjp
def spread(x: Float[Array, "t d"], order: Int[Array, " n"], inverse: Int[Array, " n"]) -> Float[Array, "n d"]:
    """Row `order[i] // k` of `x` at place i, where n = t k: every row k times, permuted by `order`.

    The gradient gathers by the `inverse` permutation and adds the k up, instead of scattering.
    """
    return jnp.take(x, order // (order.shape[0] // x.shape[0]), axis=0)


def _spread_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, Any]:
    return spread(x, order, inverse), (inverse, x.shape[0])


def _spread_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    inverse, tokens = residuals
    back = jnp.take(g, inverse, axis=0).reshape(tokens, -1, g.shape[-1])
    return back.astype(jnp.float32).sum(1).astype(g.dtype), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def permute(x: Float[Array, "n d"], order: Int[Array, " n"], inverse: Int[Array, " n"]) -> Float[Array, "n d"]:
    """`x[order]`, whose gradient is a gather by the `inverse` permutation."""
    return jnp.take(x, order, axis=0)


permute.defvjp(
    lambda x, order, inverse: (permute(x, order, inverse), inverse),
    lambda inverse, g: (jnp.take(g, inverse, axis=0), None, None),
)
