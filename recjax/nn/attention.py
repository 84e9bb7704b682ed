"""Softmax attention under one mask predicate over (position in the row, segment).

`allowed` decides who sees whom; it covers padded rows, packed rows and causal order. `attend` computes it in causal
blocks of queries, so that the part of the matrix above the diagonal is never made; `attend_dense` is the plain
reference for the tests. Neither knows projections (`recjax.nn.transformer`) nor positional encodings.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from recjax.nn.dropout import Rate, keep_mask, seed_words

NEGATIVE = np.float32(-1e30)
QUERY_BLOCK = 64


def allowed(
    q_pos: Int[Array, "#b q"], k_pos: Int[Array, "#b k"], q_seg: Int[Array, "b q"], k_seg: Int[Array, "b k"]
) -> Bool[Array, "b q k"]:
    """Whether a query may see a key: same segment, and not after the query in the row."""
    causal = q_pos[:, :, None] >= k_pos[:, None, :]
    return causal & (q_seg[:, :, None] == k_seg[:, None, :])


def attend(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    segments: Int[Array, "b l"],
    *,
    dropout: Rate = 0.0,
    key: Key[Array, ""] | None = None,
    block: int = QUERY_BLOCK,
) -> Float[Array, "b l h k"]:
    """Causal attention within segments; g key heads serve h query heads in groups of h / g.

    Scores are scaled by k^-1/2; the softmax is in float32. `dropout` acts on the attention weights.
    """
    length = q.shape[1]
    blocks = [(start, min(start + block, length)) for start in range(0, length, block)]
    parts = [_rows(q, k, v, segments, start, stop, dropout, key) for start, stop in blocks]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def attend_dense(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g k"],
    segments: Int[Array, "b l"],
    *,
    dropout: Rate = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b l h k"]:
    """`attend`, computed with the whole matrix at once."""
    return attend(q, k, v, segments, dropout=dropout, key=key, block=q.shape[1])


def _rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    start: int,
    stop: int,
    rate: Rate,
    key: jax.Array | None,
) -> jax.Array:
    """Queries `start:stop` against the keys up to `stop`."""
    b, _, heads, width = q.shape
    groups = k.shape[2]
    q, k, v = q[:, start:stop], k[:, :stop], v[:, :stop]
    q = q.reshape(b, stop - start, groups, heads // groups, width)
    scores = jnp.einsum("bqgrk,bsgk->bgrqs", q, k, preferred_element_type=jnp.float32) * np.float32(width**-0.5)
    place = jnp.arange(stop)[None]
    mask = allowed(place[:, start:], place, segments[:, start:stop], segments[:, :stop])
    scores = jnp.where(mask[:, None, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1)
    if key is not None and not (isinstance(rate, float | int) and rate == 0):
        rate = jnp.asarray(rate, jnp.float32)
        keep = keep_mask(weights.shape, rate, seed_words(key), (0, 0, 0, start, 0))
        weights = jnp.where(keep, weights / (1 - rate), 0)
    out = jnp.einsum("bgrqs,bsgk->bqgrk", weights.astype(v.dtype), v)
    return out.reshape(b, stop - start, heads, width)
