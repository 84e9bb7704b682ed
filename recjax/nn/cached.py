"""Attention of tokens that come one at a time, after a prompt that several continuations share.

Keys and values of a prompt are kept once for a row, those of what follows for each of its continuations ("beams"):
many beams cost little more memory than one, and what moves when they are reordered is a few tokens long. The plain
way to the same numbers is to run the whole row again, which is what the tests compare with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from recjax.nn.attention import NEGATIVE, product


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
