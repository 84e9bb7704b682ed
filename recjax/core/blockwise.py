"""Weights stored in 8 or 4 bits, a scale for every block, and read back where they are used.

A block is a run of entries along the last dimension; its scale is the largest of them in absolute value. "int8"
stores round(127 w / scale). "nf4" stores the nearest of 16 levels, the quantiles of a normal distribution (NF4;
Dettmers et al. 2023, QLoRA, appendix E), two to a byte. Stored arrays keep the dimensions of the weight, so that they
are split over devices, stacked and scanned as it is. Nothing here is differentiated: stored weights do not train.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from recjax.core.errors import ConfigError

KINDS = ("int8", "nf4")
VALUES, SCALES = "values", "scales"
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

Stored = dict[str, Array]


def block_of(width: int, block: int) -> int:
    """The largest divisor of `width` that is at most `block`."""
    return max(size for size in range(1, min(width, block) + 1) if width % size == 0)


def store(weight: Float[Array, "*d w"], kind: str, block: int) -> Stored:
    """`weight` as `VALUES` (int8 [*d, w], or uint8 [*d, w / 2] for "nf4") and `SCALES` (float32 [*d, w / block]).

    `block` is cut to a divisor of w. Raises `ConfigError` for an unknown kind, and for "nf4" where w is odd.
    """
    width = weight.shape[-1]
    if kind not in KINDS:
        raise ConfigError(f"no way to store weights is called {kind!r}", expected=" or ".join(map(repr, KINDS)))
    if kind == "nf4" and width % 2:
        raise ConfigError(f"nf4 stores two weights in a byte, but there are {width} in a row", expected="an even width")
    size = block_of(width, block)
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], width // size, size)
    scales = jnp.abs(blocks).max(-1)
    unit = (blocks / jnp.where(scales > 0, scales, 1)[..., None]).reshape(weight.shape)
    if kind == "int8":
        return {VALUES: jnp.round(unit * 127).astype(jnp.int8), SCALES: scales}
    edges = jnp.asarray([(a + b) / 2 for a, b in zip(_LEVELS, _LEVELS[1:], strict=False)], jnp.float32)
    codes = jnp.searchsorted(edges, unit, method="compare_all").astype(jnp.uint8)
    return {VALUES: codes[..., 0::2] | (codes[..., 1::2] << 4), SCALES: scales}


def read(stored: Stored) -> Float[Array, "*d w"]:
    """The weight again, float32."""
    values, scales = stored[VALUES], stored[SCALES]
    unit = _from_nf4(values) if values.dtype == jnp.uint8 else _from_int8(values)
    blocks = unit.reshape(*scales.shape, unit.shape[-1] // scales.shape[-1])
    return (blocks * scales[..., None]).reshape(unit.shape)


def bytes_of(shape: tuple[int, ...], kind: str, block: int) -> int:
    """Bytes that a weight takes when stored."""
    scales = math.prod(shape) // block_of(shape[-1], block)
    return math.prod(shape) // (2 if kind == "nf4" else 1) + 4 * scales


def _from_int8(values: Int8[Array, "*d w"]) -> Float[Array, "*d w"]:
    return values.astype(jnp.float32) / 127


def _from_nf4(packed: UInt8[Array, "*d h"]) -> Float[Array, "*d w"]:
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    # A choice by each bit instead of a look-up, which accelerators are slow at.
    levels: list[jax.Array | float] = list(_LEVELS)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        levels = [jnp.where(is_set, odd, even) for even, odd in zip(levels[::2], levels[1::2], strict=True)]
    return jnp.asarray(levels[0], jnp.float32)
