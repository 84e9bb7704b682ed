"""Softmax attention under one mask predicate over (position in the row, segment).

`allowed` decides who sees whom; it covers padded rows, packed rows, causal order, a prefix that everyone sees, a
prompt that several examples of a row share, and none. `attend` computes it in blocks of queries, so that where it is
causal most of the matrix above the diagonal is never made; `attend_dense` is the plain reference for the tests and
`attend_library` the kernel of jax. None of them knows projections (`recjax.nn.heads`) or positional encodings. Tokens
that come one at a time have `recjax.nn.cached`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    prefix: Bool[Array, "b k"] | None = None,
    parents: Int[Array, "b q"] | None = None,
) -> Bool[Array, "b q k"]:
    """Whether a query may see a key: same segment and, if `causal`, not after the query in the row.

    Keys in the `prefix` are seen by the queries before them, too. The segment that a query's place in `parents` names
    counts as its own; 0 names none.
    """
    same = q_seg[:, :, None] == k_seg[:, None, :]
    if parents is not None:
        same |= (parents > 0)[:, :, None] & (parents[:, :, None] == k_seg[:, None, :])
    if not causal:
        return same
    seen = q_pos[:, :, None] >= k_pos[:, None, :]
    return same & (seen if prefix is None else seen | prefix[:, None, :])


class Masks(NamedTuple):
    """What `allowed` needs of a kernel's queries and keys besides their order."""

    queries: Int[Array, "b q"]
    keys: Int[Array, "b k"]
    prefix: Bool[Array, "b k"] | None = None
    parents: Int[Array, "b q"] | None = None


def attend(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    masks: Masks,
    *,
    causal: bool = True,
    scale: float | None = None,
    bias: Float[Array, "h q s"] | None = None,
    dropout: Rate = 0.0,
    key: Key[Array, ""] | None = None,
    block: int = BLOCK,
) -> Float[Array, "b q h k"]:
    """Attention within segments, causal or not; g key heads serve h query heads in groups of h / g.

    Scores are multiplied by `scale` (k^-1/2 unless given), `bias` is added, and the softmax is in float32. `dropout`
    acts on the attention weights. The gradient keeps the exponentials of the forward pass and makes the dropout mask
    anew. Queries and keys of one row need not be equally many unless `causal`; what a query is given that may see no
    key has no meaning.
    """
    b, length, heads, width = q.shape
    groups = k.shape[2]
    if key is None or is_zero(dropout):
        drops, rate, seed = False, jnp.float32(0), jnp.zeros(2, jnp.uint32)
    else:
        drops, rate, seed = True, jnp.asarray(dropout, jnp.float32), seed_words(key)
    q = (q * jnp.asarray(scale_of(width, scale), q.dtype)).reshape(b, length, groups, heads // groups, width)
    plan = _Plan(edges(length, block), k.shape[1], drops, causal)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out: Any = _attend(plan, q.transpose(0, 2, 3, 1, 4), k, v, masks, bias, rate, seed)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, length, heads, width)


def scale_of(width: int, scale: float | None) -> float:
    """What scores of heads of this width are multiplied by."""
    return width**-0.5 if scale is None else scale


def allowed_at(at: Int[Array, "b q"], masks: Masks, *, causal: bool = True) -> Bool[Array, "b q k"]:
    """`allowed` for the queries of a few slots `at` of rows that look at themselves."""
    place = jnp.arange(masks.keys.shape[1])[None]
    here = jnp.take_along_axis(masks.queries, at, axis=1)
    parents = None if masks.parents is None else jnp.take_along_axis(masks.parents, at, axis=1)
    return allowed(at, place, here, masks.keys, causal=causal, prefix=masks.prefix, parents=parents)


def attend_dense(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    masks: Masks,
    *,
    causal: bool = True,
    scale: float | None = None,
    bias: Float[Array, "h q s"] | None = None,
) -> Float[Array, "b q h k"]:
    """`attend` without dropout, in the fewest words."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32)
    scores = scores * np.float32(scale_of(q.shape[-1], scale)) + (jnp.zeros((1, 1, 1)) if bias is None else bias)[None]
    scores = jnp.where(all_allowed(masks, causal)[:, None], scores, NEGATIVE)
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def attend_library(
    q: Float[Array, "b q h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    masks: Masks,
    *,
    causal: bool = True,
    scale: float | None = None,
    bias: Float[Array, "h q s"] | None = None,
) -> Float[Array, "b q h k"]:
    """`attend` by `jax.nn.dot_product_attention`, which knows no dropout of the weights."""
    mask = all_allowed(masks, causal)[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, bias=None if bias is None else bias[None].astype(q.dtype)
    )


def all_allowed(masks: Masks, causal: bool) -> Bool[Array, "b q k"]:
    """`allowed` for all queries and keys."""
    q_place, k_place = (jnp.arange(x.shape[1])[None] for x in masks[:2])
    return allowed(q_place, k_place, *masks[:2], causal=causal, prefix=masks.prefix, parents=masks.parents)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before any array is: edges of the query blocks, number of keys, dropped weights or not, order."""

    edges: Edges
    keys: int
    drops: bool
    causal: bool

    def blocks(self, prefix: Any) -> Iterator[tuple[int, int, int]]:
        """First and last query of each block, and where the keys that they can see end."""
        for start, stop in self.edges:
            yield start, stop, stop if self.causal and prefix is None else self.keys


def edges(length: int, block: int) -> Edges:
    """Blocks of about equal size: a short last block would cost nearly as much as a full one."""
    count = max(1, round(length / block))
    bounds = [round(i * length / count) for i in range(count + 1)]
    return tuple(zip(bounds[:-1], bounds[1:], strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, bias: Any, rate: Any, seed: Any
) -> jax.Array:
    """Scaled `q` [b, g, r, l, k] against `k`, `v` [b, g, l, k]."""
    return _forward(plan, q, k, v, masks, bias, rate, seed)[0]


def _forward(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, bias: Any, rate: Any, seed: Any
) -> tuple[jax.Array, Any]:
    outs, exponentials, sums = [], [], []
    groups, repeats = q.shape[1:3]
    q_place, k_place = jnp.arange(q.shape[3])[None], jnp.arange(plan.keys)[None]
    for start, stop, end in plan.blocks(masks.prefix):
        scores = product("bgqk,bgsk->bgqs", _rows(q, start, stop), k[..., :end, :])
        if bias is not None:
            scores = scores + bias[:, start:stop, :end].reshape(1, groups, -1, end)
        place, segments = (jnp.tile(x[:, start:stop], (1, repeats)) for x in (q_place, masks.queries))
        parents = None if masks.parents is None else jnp.tile(masks.parents[:, start:stop], (1, repeats))
        prefix = None if masks.prefix is None else masks.prefix[:, :end]
        keys = k_place[:, :end], masks.keys[:, :end]
        mask = allowed(place, keys[0], segments, keys[1], causal=plan.causal, prefix=prefix, parents=parents)
        scores = jnp.where(mask[:, None], scores, NEGATIVE)
        exps = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = exps.sum(-1, keepdims=True)
        kept = _drop(plan, exps, rate, seed, start)
        mixed = product("bgqs,bgsk->bgqk", kept.astype(v.dtype), v[..., :end, :])
        outs.append((mixed / ((1 - rate) * total)).reshape(*q.shape[:3], stop - start, -1))
        sums.append(total.reshape(*q.shape[:3], stop - start, 1))
        exponentials.append(exps.astype(v.dtype))
    out = jnp.concatenate(outs, axis=3).astype(v.dtype)
    return out, (q, k, v, masks.prefix, bias, rate, seed, out, exponentials, jnp.concatenate(sums, axis=3))


def _backward(plan: _Plan, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, prefix, bias, rate, seed, out, exponentials, sums = residuals
    d_out = d_out.astype(jnp.float32) / sums
    inner = jnp.einsum("bgrqk,bgrqk->bgrq", d_out, out.astype(jnp.float32))[..., None]
    d_out = (d_out / (1 - rate)).astype(v.dtype)
    d_q, d_k = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
    d_v, d_bias = d_k, []
    for (start, stop, end), exps in zip(plan.blocks(prefix), exponentials, strict=True):
        d_rows = _rows(d_out, start, stop)
        d_weights = product("bgqk,bgsk->bgqs", d_rows, v[..., :end, :])
        d_weights = _drop(plan, d_weights, rate, seed, start)
        d_scores = exps * (d_weights - _rows(inner, start, stop))
        if bias is not None:
            d_block = d_scores.sum(0).reshape(-1, stop - start, end)
            d_bias.append(jnp.pad(d_block, ((0, 0), (0, 0), (0, plan.keys - end))))
        d_scores = d_scores.astype(v.dtype)
        kept = _drop(plan, exps, rate, seed, start)
        d_v = d_v.at[..., :end].add(product("bgkq,bgqs->bgks", transposed(d_rows), kept))
        d_k = d_k.at[..., :end].add(product("bgkq,bgqs->bgks", transposed(_rows(q, start, stop)), d_scores))
        d_block = product("bgqs,bgsk->bgqk", d_scores, k[..., :end, :])
        d_q.append(d_block.reshape(*q.shape[:3], stop - start, -1))
    d_k, d_v = (x.swapaxes(2, 3).astype(v.dtype) for x in (d_k, d_v))
    d_bias = None if bias is None else jnp.concatenate(d_bias, axis=1).astype(bias.dtype)
    return jnp.concatenate(d_q, axis=3).astype(q.dtype), d_k, d_v, None, d_bias, None, None


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
