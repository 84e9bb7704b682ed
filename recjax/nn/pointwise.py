"""Pointwise attention of HSTU (Zhai et al. 2024, arXiv 2402.17152): SiLU of the scores instead of a softmax.

A weight depends on its own score alone, so that the strength of an interest is kept and not only its share. Computed
in the same causal blocks of queries as softmax attention, with a gradient of its own that keeps the scores and, for
the biases, sums over heads before it sorts into buckets. Which scores a bias adds is the business of
`recjax.nn.relative`, projections and gates that of `recjax.nn.heads`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recjax.nn.attention import BLOCK, NEGATIVE, Edges, allowed, edges, product
from recjax.nn.linear import transposed
from recjax.nn.relative import bucket_sums, by_bucket


def attend_pointwise(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h m"],
    segments: Int[Array, "b l"],
    *,
    length: int,
    distance_bias: Float[Array, "l l"] | None = None,
    time_bias: Float[Array, " n"] | None = None,
    buckets: Int[Array, "b l l"] | None = None,
    block: int = BLOCK,
) -> Float[Array, "b l h m"]:
    """sum over s of silu(q k_s + distance_bias + time_bias[buckets]) / `length` v_s, s causal and of the same segment.

    `length` is a constant of the model, not the number of slots: a row means the same however much it is padded.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    plan = edges(q.shape[2], block)
    out: Any = _attend(plan, q, k, v, segments, distance_bias, time_bias, buckets)
    return (out.transpose(0, 2, 1, 3) * np.float32(1 / length)).astype(v.dtype)


def attend_pointwise_at(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h m"],
    segments: Int[Array, "b l"],
    at: Int[Array, "b q"],
    bias: Float[Array, "..."],
    *,
    length: int,
) -> Float[Array, "b q h m"]:
    """`attend_pointwise` for the queries of a few slots `at`; `bias` [b, q, l] or [] is all that is added to scores."""
    place = jnp.arange(k.shape[1])[None]
    scores = product("bqhk,bshk->bhqs", q, k) + (bias[:, None] if bias.ndim else bias)
    mask = allowed(at, place, jnp.take_along_axis(segments, at, axis=1), segments)
    weights = jax.nn.silu(jnp.where(mask[:, None], scores, NEGATIVE)).astype(v.dtype)
    return (product("bhqs,bshm->bqhm", weights, v) * np.float32(1 / length)).astype(v.dtype)


def attend_pointwise_dense(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l h k"],
    v: Float[Array, "b l h m"],
    segments: Int[Array, "b l"],
    *,
    length: int,
    distance_bias: Float[Array, "l l"] | None = None,
    time_bias: Float[Array, " n"] | None = None,
    buckets: Int[Array, "b l l"] | None = None,
) -> Float[Array, "b l h m"]:
    """`attend_pointwise` in the fewest words."""
    place = jnp.arange(q.shape[1])[None]
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32)
    if distance_bias is not None:
        scores = scores + distance_bias[None, None]
    if time_bias is not None and buckets is not None:
        scores = scores + by_bucket(time_bias, buckets)[:, None]
    weights = jnp.where(allowed(place, place, segments, segments)[:, None], jax.nn.silu(scores) / length, 0)
    return jnp.einsum("bhqs,bshm->bqhm", weights.astype(v.dtype), v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Edges, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, distance: Any, time: Any, buckets: Any
) -> jax.Array:
    """Sums before they are divided by the length; `q`, `k` [b, h, l, k] and `v` [b, h, l, m]."""
    return _forward(plan, q, k, v, segments, distance, time, buckets)[0]


def _forward(
    plan: Edges, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, distance: Any, time: Any, buckets: Any
) -> tuple[jax.Array, Any]:
    outs, kept = [], []
    place = jnp.arange(q.shape[2])[None]
    for start, stop in plan:
        scores = product("bhqk,bhsk->bhqs", q[:, :, start:stop], k[:, :, :stop])
        if distance is not None:
            scores = scores + distance[None, None, start:stop, :stop]
        if time is not None:
            scores = scores + by_bucket(time, buckets[:, start:stop, :stop])[:, None]
        mask = allowed(place[:, start:stop], place[:, :stop], segments[:, start:stop], segments[:, :stop])
        scores = jnp.where(mask[:, None], scores, NEGATIVE)  # whose SiLU and its derivative are zero
        weights = scores * jax.nn.sigmoid(scores)
        outs.append(product("bhqs,bhsm->bhqm", weights.astype(v.dtype), v[:, :, :stop]))
        kept.append(scores.astype(v.dtype))
    return jnp.concatenate(outs, axis=2), (q, k, v, distance, time, buckets, kept)


def _backward(plan: Edges, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, distance, time, buckets, kept = residuals
    d_out = d_out.astype(v.dtype)
    d_q, d_k = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
    d_v = jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32)
    d_distance = None if distance is None else jnp.zeros_like(distance)
    d_time = None if time is None else jnp.zeros_like(time)
    for (start, stop), block in zip(plan, kept, strict=True):
        scores, d_rows = block.astype(jnp.float32), d_out[:, :, start:stop]
        gate = jax.nn.sigmoid(scores)
        d_scores = product("bhqm,bhsm->bhqs", d_rows, v[:, :, :stop]) * gate * (1 + scores * (1 - gate))
        if d_distance is not None:
            d_distance = d_distance.at[start:stop, :stop].add(d_scores.sum((0, 1)))
        if d_time is not None:
            d_time = d_time + bucket_sums(d_scores.sum(1), buckets[:, start:stop, :stop])
        weights, d_scores = (scores * gate).astype(v.dtype), d_scores.astype(v.dtype)
        d_v = d_v.at[..., :stop].add(product("bhmq,bhqs->bhms", transposed(d_rows), weights))
        d_k = d_k.at[..., :stop].add(product("bhkq,bhqs->bhks", transposed(q[:, :, start:stop]), d_scores))
        d_q.append(product("bhqs,bhsk->bhqk", d_scores, k[:, :, :stop]))
    d_k, d_v = (x.swapaxes(2, 3).astype(v.dtype) for x in (d_k, d_v))
    return jnp.concatenate(d_q, axis=2).astype(q.dtype), d_k, d_v, None, d_distance, d_time, None


_attend.defvjp(_forward, _backward)
