"""The attention parts of a block: from the stream to heads, through a kernel, and back.

Projections, rotary positions and what is kept for later tokens; the kernels are in `recjax.nn.attention` and
`recjax.nn.cached`, the part of HSTU is in `recjax.nn.hstu`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from recjax.core.module import Module, Rngs, param
from recjax.core.sharding import constrain
from recjax.nn.attention import NEGATIVE, Masks, allowed_at, attend, attend_library, product, scale_of
from recjax.nn.cached import Added, Branches, Kept, attend_branches, attend_cached, put
from recjax.nn.config import TransformerConfig, initializers
from recjax.nn.flash import attend_splash, attend_tokamax
from recjax.nn.layout import Layout, Source
from recjax.nn.linear import linear
from recjax.nn.norm import Norm
from recjax.nn.projections import project, take_slots, turn

_KERNELS = {"library": attend_library, "splash": attend_splash, "tokamax": attend_tokamax}
_AXES = ("embed", "heads", "head_dim")


class Heads(Module):
    """The weights of softmax attention, and what leads to heads and back."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init = initializers(c)
        zeros = nnx.initializers.zeros
        heads, groups, width = c.num_heads, c.kv_heads, c.head_width
        self.query = param(rngs, (c.width, heads, width), _AXES, init.query)
        self.key = param(rngs, (c.width, groups, width), _AXES, init.inner)
        self.value = param(rngs, (c.width, groups, width), _AXES, init.inner)
        self.out = param(rngs, (heads, width, c.width), ("heads", "head_dim", "embed"), init.outer)
        if c.has_qkv_bias:
            self.query_bias = param(rngs, (heads, width), _AXES[1:], zeros)
            self.key_bias = param(rngs, (groups, width), _AXES[1:], zeros)
            self.value_bias = param(rngs, (groups, width), _AXES[1:], zeros)
        if c.qk_norm:
            norm = {"kind": "rms", "width": width, "bias": False, "epsilon": c.norm_epsilon, "rngs": rngs}
            self.query_norm, self.key_norm = Norm(**norm), Norm(**norm)
        if c.bias:
            self.out_bias = param(rngs, (c.width,), (None,), zeros)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return scale_of(self.config.head_width, self.config.score_scale)

    def project(self, x: Float[Array, "b l d"], *names: str) -> list[jax.Array]:
        """[b, l, heads, k] for each of the names, of "query", "key" and "value"."""
        c = self.config
        biases = [getattr(self, f"{name}_bias")[...] for name in names] if c.has_qkv_bias else []
        made = project(x, [getattr(self, name)[...] for name in names], biases)
        if not c.qk_norm:
            return made
        norms = {"query": self.query_norm, "key": self.key_norm}
        return [norms[name](y) if name in norms else y for name, y in zip(names, made, strict=True)]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, rate: Any, key: Any, **more: Any) -> Any:
        """The kernel of the config, and back to the stream."""
        q = constrain(q, "batch", "length", "heads", "head_dim")
        if self.config.kernel == "blocks":
            return self.close(attend(q, k, v, masks, scale=self.scale, dropout=rate, key=key, **more))
        return self.close(_KERNELS[self.config.kernel](q, k, v, masks, scale=self.scale, **more))

    def close(self, mixed: Float[Array, "b l h k"]) -> Float[Array, "b l d"]:
        """From heads back to the stream."""
        out = self.out[...].reshape(-1, self.config.width)
        return linear(mixed.reshape(*mixed.shape[:2], -1), out, self.out_bias[...] if self.config.bias else None)


class SelfAttention(Heads):
    """Multi-head attention of tokens to those of their segment.

    `bias` [h, l, l] is what relative positions add to the scores, None where they add nothing.
    """

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, bias: Any, rate: Any, key: Any
    ) -> tuple[Float[Array, "b l d"], Kept]:
        """The outcome, and what later tokens need of these.

        `rate` is the dropout of the attention weights and `key` its key, None when not training.
        """
        q, k, v = self.project(x, "query", "key", "value")
        q, k = self._turn(q, layout.positions), self._turn(k, layout.positions)
        out = self.attend(q, k, v, masks_of(layout), rate, key, causal=self.config.causal, bias=bias)
        return out, Kept(k, v)

    def kept(self, x: Float[Array, "b l d"], layout: Layout) -> Kept:
        """What later tokens need of these, alone."""
        k, v = self.project(x, "key", "value")
        return Kept(self._turn(k, layout.positions), v)

    def extend(
        self,
        x: Float[Array, "b m d"],
        positions: Int[Array, "b m"],
        prompt: Kept,
        own: Kept,
        step: ArrayLike,
        added: Added,
    ) -> tuple[Float[Array, "b m d"], Kept]:
        """One more token for each beam: what calling it on the whole row would give there, and `own` with the token."""
        q, k, v = self.project(x, "query", "key", "value")
        own = put(own, Kept(self._turn(k, positions), v), step)
        q = self._turn(q, positions)
        return self.close(attend_cached(q, (prompt, added.prompt), (own, added.own), scale=self.scale)), own

    def branch(
        self, x: Float[Array, "b n d"], branches: Branches, prompt: Kept, slots: Int[Array, "b m"] | None
    ) -> Float[Array, "b _ d"]:
        """What calling it on rows of the prompt and one continuation each would give for the continuations' tokens.

        For all of them, or for one of each: that at `slots` of x.
        """
        if slots is None:
            q, k, v = self.project(x, "query", "key", "value")
            places = branches.positions
        else:
            [q], (k, v) = self.project(take_slots(x, slots), "query"), self.project(x, "key", "value")
            places = jnp.take_along_axis(branches.positions, slots, axis=1)
        q, k = self._turn(q, places), self._turn(k, branches.positions)
        q, k, v = (y.reshape(y.shape[0], branches.count, -1, *y.shape[2:]) for y in (q, k, v))
        tokens = k.shape[2]
        at = jnp.arange(tokens)[None, None] if slots is None else (slots % tokens)[..., None]
        mixed = attend_branches(q, at, prompt, Kept(k, v), branches.visible, scale=self.scale)
        return self.close(mixed.reshape(x.shape[0], -1, *mixed.shape[3:]))

    def at(
        self, x: Float[Array, "b l d"], layout: Layout, bias: Any, slots: Int[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """What calling it gives at some slots, without dropout and without making the rest.

        Few queries: their scores q . (x W_k) are (q W_k^T) . x, and a mean of values is the value of a mean, so neither
        keys nor values are made. (The bias of the keys adds the same to all scores of a query. Keys that are turned by
        their position or normalised have to be made.)
        """
        c = self.config
        count, groups = slots.shape[1], c.kv_heads
        [q] = self.project(take_slots(x, slots), "query")
        q = self._turn(q, jnp.take_along_axis(layout.positions, slots, axis=1))
        q = (q * jnp.asarray(self.scale, q.dtype)).reshape(-1, count, groups, c.num_heads // groups, c.head_width)
        if "rotary" in c.position or c.qk_norm:
            [k] = self.project(x, "key")
            scores = product("bqgrk,bsgk->bgrqs", q, self._turn(k, layout.positions))
        else:
            turned = product("bqgrk,dgk->bqgrd", q, self.key[...].astype(x.dtype)).astype(x.dtype)
            scores = product("bqgrd,bsd->bgrqs", turned, x)
        flat = scores.reshape(x.shape[0], c.num_heads, count, -1)
        if bias is not None:
            flat = flat + jnp.moveaxis(jnp.take(bias, slots, axis=1), 0, 1)
        visible = allowed_at(slots, masks_of(layout), causal=c.causal)[:, None]
        weights = jax.nn.softmax(jnp.where(visible, flat, NEGATIVE), axis=-1)
        mixed = product("bgrqs,bsd->bgrqd", weights.astype(x.dtype).reshape(scores.shape), x).astype(x.dtype)
        out = product("bgrqd,dgk->bqgrk", mixed, self.value[...].astype(x.dtype))
        if c.has_qkv_bias:
            out = out + self.value_bias[...][None, None, :, None]
        return self.close(out.astype(x.dtype).reshape(*slots.shape, c.num_heads, c.head_width))

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return turn(self.config, x, positions)


class CrossAttention(Heads):
    """Multi-head attention of tokens to those of another stack that have the same segment number; no positions."""

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, source: Source, rate: Any, key: Any
    ) -> tuple[Float[Array, "b l d"], Kept]:
        """As `SelfAttention`; kept are the tokens of the `source`."""
        [q], kept = self.project(x, "query"), self.kept(source.hidden)
        masks = Masks(layout.segments, source.segments)
        return self.attend(q, *kept, masks, rate, key, causal=False), kept

    def kept(self, source: Float[Array, "b s d"]) -> Kept:
        """What tokens need of the other stack's."""
        return Kept(*self.project(source, "key", "value"))

    def recall(self, x: Float[Array, "b m d"], source: Kept, added: Float[Array, "_ _ s"]) -> Float[Array, "b m d"]:
        """What calling it gives for single tokens of beams."""
        [q] = self.project(x, "query")
        return self.close(attend_cached(q, (source, added), scale=self.scale))


def masks_of(layout: Layout) -> Masks:
    """The masks of rows that look at themselves."""
    return Masks(layout.segments, layout.segments, layout.prefix, layout.parents)
