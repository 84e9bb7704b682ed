"""Attention of what comes after a prompt that several continuations share.

Keys and values of a prompt are kept once for a row. Tokens that come one at a time (`attend_cached`) have their own
kept for each continuation ("beam"): many beams cost little more memory than one, and what moves when they are
reordered is a few tokens long. Continuations whose tokens are all known (`attend_branches`) need nothing kept. The
plain way to the same numbers is to run the whole row again, which is what the tests compare with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from recjax.core import sharding
from recjax.nn.attention import NEGATIVE, product

# Scores that exist at once: few enough for the caches of a CPU, enough to fill an accelerator.
_CELLS = {"cpu": 2**21}
_CELLS_ELSEWHERE = 2**28


class Kept(NamedTuple):
    """Keys and values of tokens, [..., g, k], turned by their positions where a model does that.

    Of a prompt [n, b, l, g, k] for the n layers of a stack; of a suffix [b, m, n, s, g, k] for the m beams of a row,
    of which the first so many of s steps are filled.
    """

    keys: Array
    values: Array


class Seen(NamedTuple):
    """Tokens of another stack that every token looks at: what is kept of them, and which of them a row may see."""

    kept: Kept
    visible: Bool[Array, "b s"]


class Prompt(NamedTuple):
    """What the tokens after a prompt need of it: the same for all beams of a row.

    `visible` are the slots that its last token sees, and every later one; `slot` is where that token is in the row
    and `position` where it is in its example. `source` is what cross-attention looks at, if there is any.
    """

    kept: Kept
    visible: Bool[Array, "b l"]
    slot: Int[Array, " b"]
    position: Int[Array, " b"]
    source: Seen | None = None


class Branches(NamedTuple):
    """m continuations of a prompt, t tokens each, one after another in rows [b, m * t].

    `positions` are those of their tokens in their examples, `visible` the slots of the prompt that all of them see.
    """

    positions: Int[Array, "b n"]
    visible: Bool[Array, "b s"]
    count: int


class Added(NamedTuple):
    """What is added to the scores of a beam's next token, in all layers: biases, and -1e30 where it must not look."""

    prompt: Float[Array, "b h l"]
    own: Float[Array, "b h s"]
    source: Float[Array, "b h s"] | None


def empty(prompt: Prompt, beams: int, steps: int) -> Kept:
    """The suffix of beams that have no token yet, with room for `steps`."""
    layers, rows, _, *head = prompt.kept.keys.shape
    return Kept(*(jnp.zeros((rows, beams, layers, steps, *head), x.dtype) for x in prompt.kept))


def by_layer(suffix: Kept) -> Kept:
    """The suffix with its layers first, to be run over."""
    return Kept(*(jnp.moveaxis(x, 2, 0) for x in suffix))


def by_beam(suffix: Kept) -> Kept:
    """Undo `by_layer`."""
    return Kept(*(jnp.moveaxis(x, 0, 2) for x in suffix))


def put(own: Kept, token: Kept, step: ArrayLike) -> Kept:
    """One layer of a suffix [b, m, s, g, k] with the `token` [b, m, g, k] at `step`."""
    return Kept(*(jax.lax.dynamic_update_index_in_dim(x, y, step, 2) for x, y in zip(own, token, strict=True)))


def unless(visible: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """What masks scores by being added to them: 0 where visible."""
    return jnp.where(visible, jnp.float32(0), NEGATIVE)


def attend_cached(
    q: Float[Array, "b m h k"], *parts: tuple[Kept, Float[Array, "_ _ _"]], scale: float
) -> Float[Array, "b m h k"]:
    """Attention of one token of each beam to several parts of what was kept, in one softmax.

    A part is [b, s, g, k], shared by the beams of a row, or [b, m, s, g, k], with what is added to its scores: of
    [b, h, s], where b and h may be 1.
    """
    rows, beams, heads, width = q.shape
    groups = parts[0][0].keys.shape[-2]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(rows, beams, groups, heads // groups, width)

    def tokens(x: jax.Array) -> str:
        return "bsgk" if x.ndim == 4 else "bmsgk"

    scores = []
    for kept, added in parts:
        by_head = (groups, heads // groups) if added.shape[1] == heads else (1, 1)
        added = added.reshape(added.shape[0], *by_head, 1, -1)
        scores.append(product(f"bmgrk,{tokens(kept.keys)}->bgrms", q, kept.keys) + added)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    mixed, start = jnp.zeros((), jnp.float32), 0
    for (kept, _), part in zip(parts, scores, strict=True):
        here = weights[..., start : start + part.shape[-1]]
        mixed, start = mixed + product(f"bgrms,{tokens(kept.values)}->bmgrk", here, kept.values), start + part.shape[-1]
    return mixed.astype(q.dtype).reshape(rows, beams, heads, width)


def attend_branches(
    q: Float[Array, "b m q h k"],
    at: Int[Array, "#b #m q"],
    prompt: Kept,
    own: Kept,
    visible: Bool[Array, "b s"],
    *,
    scale: float,
) -> Float[Array, "b m q h k"]:
    """Attention of tokens of m continuations to the `prompt` and, causally, to their `own`.

    These are kept [b, s, g, k] and [b, m, t, g, k]; query i of a continuation is its token `at[..., i]`. The softmax is
    one over both, in float32. Continuations are taken a few at a time, so that the scores of all of them never exist
    together.
    """
    rows, count, asked, heads, width = q.shape
    slots, groups = prompt.keys.shape[1:3]
    tokens, repeats = own.keys.shape[2], heads // groups
    size = _at_once(count, rows * heads * asked * (slots + tokens))
    q = (q * jnp.asarray(scale, q.dtype)).reshape(rows, count, asked, groups, repeats, width)
    at = jnp.broadcast_to(at, (at.shape[0], count, asked))
    to_prompt = unless(visible)[:, None, None]
    place = jnp.arange(tokens)[None, None, None]
    # Heads first and what is summed over last: then all products below are plain ones.
    keys, values = (x.transpose(0, 2, 1, 3) for x in prompt)

    def some(part: tuple[jax.Array, ...]) -> jax.Array:
        q, at, own_keys, own_values = part  # [b, g, m, r, q, k], [b, m, q], [b, g, m, t, k]
        flat = q.reshape(rows, groups, -1, width)
        shared = (product("bgnk,bgsk->bgns", flat, keys) + to_prompt).reshape(*q.shape[:-1], slots)
        alone = product("bgmnk,bgmtk->bgmnt", q.reshape(rows, groups, size, -1, width), own_keys)
        alone = alone.reshape(*q.shape[:-1], tokens) + unless(place <= at[..., None])[:, None, :, None]
        top = jnp.maximum(shared.max(-1, keepdims=True), alone.max(-1, keepdims=True))
        shared, alone = jnp.exp(shared - top), jnp.exp(alone - top)
        total = shared.sum(-1, keepdims=True) + alone.sum(-1, keepdims=True)
        shared, alone = shared.astype(values.dtype), alone.astype(values.dtype)
        mixed = product("bgns,bgsk->bgnk", shared.reshape(rows, groups, -1, slots), values).reshape(q.shape)
        own = product("bgmnt,bgmtk->bgmnk", alone.reshape(rows, groups, size, -1, tokens), own_values)
        return ((mixed + own.reshape(q.shape)) / total).astype(values.dtype)

    def cut(x: jax.Array, *order: int) -> jax.Array:
        """[b, m, ...] as [steps, ...], the rest in this order, in which m is of one step."""
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0).transpose(0, *(1 + i for i in order))

    parts = (cut(q, 0, 3, 1, 4, 2, 5), cut(at, 0, 1, 2), *(cut(x, 0, 3, 1, 2, 4) for x in own))
    mixed = some(tuple(x[0] for x in parts))[None] if size == count else jax.lax.map(some, parts)
    return mixed.transpose(1, 0, 3, 5, 2, 4, 6).reshape(rows, count, asked, heads, width)


def _at_once(count: int, cells: int) -> int:
    """The most of `count` continuations, `cells` scores each, that are taken together; it divides their number."""
    most = max(1, _CELLS.get(sharding.platform(), _CELLS_ELSEWHERE) // cells)
    return max(size for size in range(1, count + 1) if count % size == 0 and size <= most)
