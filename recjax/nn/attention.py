"""Softmax attention under one mask predicate over (position in the row, segment).

`allowed` decides who sees whom; it covers padded rows, packed rows, causal order and none. `attend` computes it in
blocks of queries, so that where it is causal most of the matrix above the diagonal is never made; `attend_dense` is
the plain reference for the tests and `attend_library` the kernel of jax. None of them knows projections
(`recjax.nn.heads`) or positional encodings.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from recjax.nn.dropout import Rate, is_zero, keep_mask, seed_words
from recjax.nn.linear import transposed

NEGATIVE = np.float32(-1e30)
# Queries per block. Small enough to skip most of what causality forbids, large enough for efficient products.
BLOCK = 100
Edges = tuple[tuple[int, int], ...]


def allowed(
    q_pos: Int[Array, "#b q"],
    k_pos: Int[Array, "#b k"],
    q_seg: Int[Array, "b q"],
    k_seg: Int[Array, "b k"],
    *,
    causal: bool = True,
) -> Bool[Array, "b q k"]:
    """Whether a query may see a key: same segment and, if `causal`, not after the query in the row."""
    same = q_seg[:, :, None] == k_seg[:, None, :]
    return same & (q_pos[:, :, None] >= k_pos[:, None, :]) if causal else same


def attend(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    segments: Int[Array, "b l"],
    *,
    causal: bool = True,
    dropout: Rate = 0.0,
    key: Key[Array, ""] | None = None,
    block: int = BLOCK,
) -> Float[Array, "b l h k"]:
    """Attention within segments, causal or not; g key heads serve h query heads in groups of h / g.

    Scores are scaled by k^-1/2 and the softmax is in float32. `dropout` acts on the attention weights. The gradient
    keeps the exponentials of the forward pass and makes the dropout mask anew.
    """
    b, length, heads, width = q.shape
    groups = k.shape[2]
    if key is None or is_zero(dropout):
        drops, rate, seed = False, jnp.float32(0), jnp.zeros(2, jnp.uint32)
    else:
        drops, rate, seed = True, jnp.asarray(dropout, jnp.float32), seed_words(key)
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(b, length, groups, heads // groups, width)
    plan = _Plan(edges(length, block), drops, causal)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out: Any = _attend(plan, q.transpose(0, 2, 3, 1, 4), k, v, segments, rate, seed)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, length, heads, width)


def weights_at(
    scores: Float[Array, "b h q l"], segments: Int[Array, "b l"], at: Int[Array, "b q"], *, causal: bool = True
) -> Float[Array, "b h q l"]:
    """Attention weights of the queries of a few slots `at`: the softmax over the keys that each of them may see."""
    place = jnp.arange(scores.shape[-1])[None]
    mask = allowed(at, place, jnp.take_along_axis(segments, at, axis=1), segments, causal=causal)
    return jax.nn.softmax(jnp.where(mask[:, None], scores, NEGATIVE), axis=-1)


def attend_dense(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    segments: Int[Array, "b l"],
    *,
    causal: bool = True,
) -> Float[Array, "b l h k"]:
    """`attend` without dropout, in the fewest words."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    place = jnp.arange(q.shape[1])[None]
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32) * np.float32(q.shape[-1] ** -0.5)
    scores = jnp.where(allowed(place, place, segments, segments, causal=causal)[:, None], scores, NEGATIVE)
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def attend_library(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    segments: Int[Array, "b l"],
    *,
    causal: bool = True,
) -> Float[Array, "b l h k"]:
    """`attend` by `jax.nn.dot_product_attention`, which knows no dropout of the weights."""
    place = jnp.arange(q.shape[1])[None]
    mask = allowed(place, place, segments, segments, causal=causal)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before any array is: the edges of the query blocks, whether weights are dropped, the order."""

    edges: Edges
    drops: bool
    causal: bool

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """First and last query of each block, and where the keys that they can see end."""
        for start, stop in self.edges:
            yield start, stop, stop if self.causal else self.edges[-1][1]


def edges(length: int, block: int) -> Edges:
    """Blocks of about equal size: a short last block would cost nearly as much as a full one."""
    count = max(1, round(length / block))
    bounds = [round(i * length / count) for i in range(count + 1)]
    return tuple(zip(bounds[:-1], bounds[1:], strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, rate: Any, seed: Any) -> jax.Array:
    """Scaled `q` [b, g, r, l, k] against `k`, `v` [b, g, l, k]."""
    return _forward(plan, q, k, v, segments, rate, seed)[0]


def _forward(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, rate: Any, seed: Any
) -> tuple[jax.Array, Any]:
    outs, exponentials, sums = [], [], []
    repeats = q.shape[2]
    place = jnp.arange(q.shape[3])[None]
    for start, stop, end in plan.blocks():
        scores = product("bgqk,bgsk->bgqs", _rows(q, start, stop), k[..., :end, :])
        q_place, q_segments = (jnp.tile(x[:, start:stop], (1, repeats)) for x in (place, segments))
        mask = allowed(q_place, place[:, :end], q_segments, segments[:, :end], causal=plan.causal)
        scores = jnp.where(mask[:, None], scores, NEGATIVE)
        exps = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = exps.sum(-1, keepdims=True)
        kept = _drop(plan, exps, rate, seed, start)
        mixed = product("bgqs,bgsk->bgqk", kept.astype(v.dtype), v[..., :end, :])
        outs.append((mixed / ((1 - rate) * total)).reshape(*q.shape[:3], stop - start, -1))
        sums.append(total.reshape(*q.shape[:3], stop - start, 1))
        exponentials.append(exps.astype(v.dtype))
    out = jnp.concatenate(outs, axis=3).astype(v.dtype)
    return out, (q, k, v, rate, seed, out, exponentials, jnp.concatenate(sums, axis=3))


def _backward(plan: _Plan, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, rate, seed, out, exponentials, sums = residuals
    d_out = d_out.astype(jnp.float32) / sums
    inner = jnp.einsum("bgrqk,bgrqk->bgrq", d_out, out.astype(jnp.float32))[..., None]
    d_out = (d_out / (1 - rate)).astype(v.dtype)
    d_q, d_k = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
    d_v = d_k
    for (start, stop, end), exps in zip(plan.blocks(), exponentials, strict=True):
        d_rows = _rows(d_out, start, stop)
        d_weights = product("bgqk,bgsk->bgqs", d_rows, v[..., :end, :])
        d_weights = _drop(plan, d_weights, rate, seed, start)
        d_scores = (exps * (d_weights - _rows(inner, start, stop))).astype(v.dtype)
        kept = _drop(plan, exps, rate, seed, start)
        d_v = d_v.at[..., :end].add(product("bgkq,bgqs->bgks", transposed(d_rows), kept))
        d_k = d_k.at[..., :end].add(product("bgkq,bgqs->bgks", transposed(_rows(q, start, stop)), d_scores))
        d_block = product("bgqs,bgsk->bgqk", d_scores, k[..., :end, :])
        d_q.append(d_block.reshape(*q.shape[:3], stop - start, -1))
    d_k, d_v = (x.swapaxes(2, 3).astype(v.dtype) for x in (d_k, d_v))
    return jnp.concatenate(d_q, axis=3).astype(q.dtype), d_k, d_v, None, None, None


_attend.defvjp(_forward, _backward)


def _rows(x: jax.Array, start: int, stop: int) -> jax.Array:
    """A block of positions of all the heads of a group, one below the other: [b, g, r * (stop - start), k]."""
    return x[..., start:stop, :].reshape(*x.shape[:2], -1, x.shape[-1])


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum that adds up in float32."""
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _drop(plan: _Plan, x: jax.Array, rate: Any, seed: Any, start: int) -> jax.Array:
    """Zero the dropped weights of the block of queries that begins at `start`; scaling is left to the caller."""
    if not plan.drops:
        return x
    repeats = x.shape[2] // (dict(plan.edges)[start] - start)
    keep = keep_mask(x.shape, rate, seed, first=start * repeats, rows=plan.edges[-1][1] * repeats)
    return jnp.where(keep, x, jnp.zeros((), x.dtype))
