"""Attention for long rows by kernels of accelerators, which never have the scores of a row in memory.

"splash" is jax's own for TPU, which skips blocks of another segment or of the future; "tokamax" that library's for GPU
and TPU, given the mask as a whole. Neither drops weights, and splash knows segments and order alone. They are choices
of `TransformerConfig.kernel` and refused where they cannot run; nothing falls back to another kernel.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.sharding import active
from recjax.nn.attention import Masks, all_allowed, scale_of
from recjax.nn.kernels import check_device, tokamax

LANES = 128
_BLOCKS = (512, 256, LANES)


def attend_splash(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    masks: Masks,
    *,
    causal: bool = True,
    scale: float | None = None,
    bias: None = None,
    interpret: bool = False,
) -> Float[Array, "b q h k"]:
    """`attend` without bias and dropout on TPU; `interpret` runs the kernel's program on any device, very slowly.

    Rows are padded to a multiple of 128 slots. Raises `ConfigError` on another device, and for a prefix or parents.
    """
    if not interpret:
        check_device("splash", ("tpu",), where="TransformerConfig", instead="blocks")
    if masks.prefix is not None or masks.parents is not None:
        raise ConfigError("splash attention knows no prefix and no parents", mend='TransformerConfig.kernel = "blocks"')
    q = q * jnp.asarray(scale_of(q.shape[-1], scale), q.dtype)
    run: Any = functools.partial(_splash, causal=causal, interpret=interpret)
    if (mesh := active()) is not None and mesh.devices.size > 1:
        rows, heads = (mesh.axes_of(name) or None for name in ("batch", "heads"))
        by_head, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
        specs = (by_head, by_head, by_head, by_row, by_row)
        run = jax.shard_map(run, mesh=mesh.devices, in_specs=specs, out_specs=by_head, check_vma=False)
    return run(q, k, v, masks.queries, masks.keys)


def attend_tokamax(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    masks: Masks,
    *,
    causal: bool = True,
    scale: float | None = None,
    bias: Float[Array, "h q s"] | None = None,
) -> Float[Array, "b q h k"]:
    """`attend` without dropout by tokamax; raises `ConfigError` without the library, and on a CPU."""
    library, own = tokamax(where="TransformerConfig", instead="blocks")
    mask = all_allowed(masks, causal)[:, None]
    bias = None if bias is None else bias[None].astype(q.dtype)
    return library.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, implementation=own)


def _splash(q: Any, k: Any, v: Any, q_segments: Any, k_segments: Any, *, causal: bool, interpret: bool) -> jax.Array:
    """One device's rows and heads, in whole blocks."""
    kernels, mask_lib = (
        importlib.import_module(f"jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_{name}")
        for name in ("kernel", "mask")
    )
    length = q.shape[1]
    (q, q_segments), (k, k_segments), (v, _) = (
        (_padded(x), _padded(s)) for x, s in ((q, q_segments), (k, k_segments), (v, k_segments))
    )
    block_q, block_k = (next(n for n in _BLOCKS if x.shape[1] % n == 0) for x in (q, k))
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    shape = (q.shape[1], k.shape[1])
    one = mask_lib.CausalMask(shape) if causal else mask_lib.FullMask(shape)
    kernel = kernels.make_splash_mha(
        mask_lib.MultiHeadMask([one] * q.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
        segments = kernels.SegmentIds(q=q_segments, kv=k_segments)
        return kernel(*(x.swapaxes(0, 1) for x in (q, k, v)), segment_ids=segments).swapaxes(0, 1)

    # What is compiled keeps the name, by which `recjax compile` knows how much of it is skipped.
    with jax.named_scope("causal_attention" if causal else "attention"):
        return jax.vmap(row)(q, k, v, q_segments, k_segments)[:, :length]


def _padded(x: jax.Array) -> jax.Array:
    """With slots of segment 0 behind, in a multiple of 128 slots."""
    behind = -x.shape[1] % LANES
    return jnp.pad(x, [(0, 0), (0, behind)] + [(0, 0)] * (x.ndim - 2))
