"""Products of sorted rows with the matrix of their group by kernels of jax for TPU (Gale et al. 2022, MegaBlocks).

`jax.lax.ragged_dot` is as good a kernel forward. The gradient of its matrices XLA:TPU writes out as a masked product
over all rows for each group: on a mesh where a device has the experts of a few of the rows brought to it, most of that
is for nothing. Here rows past the last group are skipped in every product.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS = (512, 256, 128)


def megablox_product(
    x: Float[Array, "n i"], weights: Float[Array, "e i o"], sizes: Int[Array, " e"], *, interpret: bool = False
) -> Float[Array, "n o"]:
    """As `recjax.nn.grouped.grouped_product`; zero past the last group. `interpret` runs it on any device, slowly."""
    return _product(x, weights, sizes, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, weights: jax.Array, sizes: jax.Array, interpret: bool) -> jax.Array:
    padded, groups, (rows, i, o) = _prepared(x, weights, sizes)
    out = _backend().gmm(padded, weights, groups, x.dtype, (rows, i, o), interpret=interpret)
    return out[: len(x)]


def _forward(x: jax.Array, weights: jax.Array, sizes: jax.Array, interpret: bool) -> tuple[jax.Array, Any]:
    return _product(x, weights, sizes, interpret), (x, weights, sizes)


def _backward(interpret: bool, residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, weights, sizes = residuals
    padded, groups, (rows, i, o) = _prepared(x, weights, sizes)
    padded_g, backend, dtype = _padded(g), _backend(), x.dtype
    d_x = backend.gmm(padded_g, weights, groups, dtype, (rows, o, i), transpose_rhs=True, interpret=interpret)
    d_weights = backend.tgmm(
        padded.T, padded_g, groups, dtype, (rows, i, o), num_actual_groups=len(sizes), interpret=interpret
    )
    return d_x[: len(x)], d_weights.astype(weights.dtype), None


_product.defvjp(_forward, _backward)


def _prepared(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array, tuple[int, int, int]]:
    """Whole blocks of rows, the groups and one more of the rows that have none, and sizes of blocks that fit."""
    padded = _padded(x)
    groups = jnp.append(sizes, padded.shape[0] - sizes.sum()).astype(jnp.int32)
    most = 1024 if x.dtype.itemsize < 4 else 512
    rows = next(n for n in _ROWS if padded.shape[0] % n == 0)
    return padded, groups, (rows, min(most, weights.shape[1]), min(most, weights.shape[2]))


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % _ROWS[-1]), (0, 0)))


def _backend() -> Any:
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
