"""The one transformer: a stack of equal blocks described by a frozen config.

T5 1.1, Llama, SASRec, BERT4Rec, LSRM, HSTU and eSASRec are rows of the table that `TransformerConfig` spans. The stack
works on vectors; the tables at its two ends (items, learned positions) belong to the models.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, one, param, scan, some, stack
from recjax.nn.attention import allowed, allowed_at
from recjax.nn.block import Block
from recjax.nn.cached import Added, Branches, Kept, Prompt, Seen, by_beam, by_layer, empty, unless
from recjax.nn.config import TransformerConfig
from recjax.nn.heads import masks_of
from recjax.nn.layout import Layout, Source
from recjax.nn.moe import Routing
from recjax.nn.norm import Norm
from recjax.nn.relative import T5_BUCKETS, t5_bias, t5_buckets, time_buckets

__all__ = ["Block", "Transformer", "TransformerConfig"]

INIT_STD = 0.02


class Transformer(Module):
    """`num_layers` blocks and, unless told otherwise, a norm; with `relative` "t5" the biases that they share."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        self.layers = stack(lambda r: Block(c, rngs=r), c.num_layers, rngs)
        self.final_norm = (
            Norm(kind=c.norm, width=c.width, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs) if c.final_norm else None
        )
        if c.relative == "t5":
            normal = nnx.initializers.normal(c.width**-0.5)
            self.relative_bias = param(rngs, (c.num_heads, T5_BUCKETS), ("heads", None), normal)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        layout: Layout,
        *,
        train: bool,
        key: Key[Array, ""] | None,
        query_at: Int[Array, "b q"] | None = None,
        source: Source | None = None,
    ) -> Float[Array, "b _ d"]:
        """Contextual vectors, normalised; `key` seeds the dropout and may be None when not training.

        With `query_at` (not when training) only the vectors at those slots, [b, q, d]: the last block, which nothing
        comes after, is then made for them alone. `source` is what the `cross` part of the blocks looks at.
        """
        if query_at is not None:
            x, shared, _ = self._below(x, layout, source)
            return self._close(self._top.at(x, layout, shared, source, query_at))
        return self.routed(x, layout, train=train, key=key, source=source)[0]

    def routed(
        self,
        x: Float[Array, "b l d"],
        layout: Layout,
        *,
        train: bool,
        key: Key[Array, ""] | None,
        source: Source | None = None,
    ) -> tuple[Float[Array, "b l d"], Routing | None]:
        """The vectors, and what the routers of all layers did, [n, b, ...]; None without experts."""
        c = self.config
        rates = jnp.asarray(c.dropout_rates, jnp.float32)
        drops = 5 if c.cross else 3
        keys = jax.random.split(key, (c.num_layers, drops)) if train and key is not None else None
        shared = self._shared(layout, source)

        def call(block: Block, x: jax.Array, per_layer: Any) -> tuple[jax.Array, Routing | None]:
            x, _, routing = block(x, layout, shared, source, *per_layer)
            return x, routing

        x = x.astype(c.dtype)
        x, routing = scan(self.layers, call, x, (rates, keys), remat=c.remat == "full", unroll=self._unroll)
        return self._close(x), routing

    def prefill(
        self, x: Float[Array, "b l d"], layout: Layout, slot: Int[Array, " b"], *, source: Source | None = None
    ) -> tuple[Float[Array, "b d"], Prompt]:
        """The vector at one slot of each row, as calling gives it, and what the tokens after that slot need.

        Raises `ConfigError` where attention is not causal or keeps no keys and values.
        """
        c, at = self.config, slot[:, None]
        if c.attention != "softmax" or not c.causal:
            raise ConfigError(
                "this transformer cannot answer token by token",
                where=f"TransformerConfig.attention = {c.attention!r}, causal = {c.causal}",
                expected="causal softmax attention",
                mend="spell items with one token each, or take another encoder",
            )
        x, shared, below = self._below(x, layout, source)
        top = self._top.kept(x, layout, source)
        own, crossed = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), below, top) if below else _stacked(top)
        seen = None
        if source is not None:
            here = jnp.take_along_axis(layout.segments, at, axis=1)
            there = source.segments
            seen = Seen(crossed, allowed(jnp.zeros_like(here), jnp.zeros_like(there), here, there, causal=False)[:, 0])
        prompt = Prompt(
            kept=own,
            visible=allowed_at(at, masks_of(layout))[:, 0],
            slot=slot,
            position=jnp.take_along_axis(layout.positions, at, axis=1)[:, 0],
            source=seen,
        )
        return self._close(self._top.at(x, layout, shared, source, at))[:, 0], prompt

    def start(self, prompt: Prompt, beams: int, steps: int) -> Kept:
        """The suffix of beams without a token, leaves [b, beams, ...], with room for `steps` tokens."""
        return empty(prompt, beams, steps)

    def extend(
        self, prompt: Prompt, suffix: Kept, x: Float[Array, "b m d"], step: ArrayLike
    ) -> tuple[Float[Array, "b m d"], Kept]:
        """The vector of one more token of each beam, and the suffix with it; it is token `step` after the prompt."""
        positions = jnp.broadcast_to(prompt.position[:, None] + 1 + step, x.shape[:2])
        added = self._added(prompt, suffix.keys.shape[3], step)

        def call(block: Block, x: jax.Array, kept: Any) -> tuple[jax.Array, Kept]:
            return block.extend(x, positions, kept, step, added)

        crossed = None if prompt.source is None else prompt.source.kept
        kept = (by_layer(suffix), prompt.kept, crossed)
        x, own = scan(self.layers, call, x.astype(self.config.dtype), kept, unroll=self._unroll)
        return self._close(x), by_beam(own)

    def branch(self, prompt: Prompt, x: Float[Array, "b n d"], slots: Int[Array, "b m"]) -> Float[Array, "b m d"]:
        """The vector of one token of each of m continuations, whose n / m tokens each stand one after another in `x`.

        It is number `slots` of its continuation (0 the first), and what calling gives for the row of the prompt and
        that continuation; what comes after it is not looked at. Raises `ConfigError` for relative positions.
        """
        c, count = self.config, slots.shape[1]
        if c.relative != "none" or c.cross:
            raise ConfigError(
                "this transformer cannot read several continuations of a prompt",
                where=f"TransformerConfig.relative = {c.relative!r}, cross = {c.cross}",
                expected="a decoder with learned or rotary positions",
            )
        tokens = x.shape[1] // count
        place = jnp.arange(x.shape[1], dtype=jnp.int32)[None] % tokens
        branches = Branches(prompt.position[:, None] + 1 + place, prompt.visible, count)
        asked = slots + tokens * jnp.arange(count, dtype=jnp.int32)[None]
        below, top = (jax.tree.map(lambda kept, at=at: kept[at], prompt.kept) for at in (slice(0, -1), -1))

        def call(block: Block, x: jax.Array, kept: Kept) -> tuple[jax.Array, None]:
            return block.branch(x, branches, kept), None

        x = x.astype(c.dtype)
        if c.num_layers > 1:
            x, _ = scan(some(self.layers, 0, c.num_layers - 1), call, x, below, unroll=self._unroll)
        return self._close(self._top.branch(x, branches, top, asked))

    def _close(self, x: jax.Array) -> jax.Array:
        return x if self.final_norm is None else self.final_norm(x)

    @property
    def _unroll(self) -> bool:
        c = self.config
        return c.num_layers <= 4 if c.unroll is None else c.unroll

    @property
    def _top(self) -> Any:
        """The last block."""
        return one(self.layers, self.config.num_layers - 1)

    def _below(self, x: jax.Array, layout: Layout, source: Source | None) -> tuple[jax.Array, Any, Any]:
        """When not training: the stream below the last block, what layers share, and what blocks kept (None: no block
        is below)."""
        x, shared, last = x.astype(self.config.dtype), self._shared(layout, source), self.config.num_layers - 1

        def call(block: Block, x: jax.Array, _: None) -> Any:
            return block(x, layout, shared, source, 0.0, None)[:2]

        if not last:
            return x, shared, None
        x, kept = scan(some(self.layers, 0, last), call, x, None, unroll=self._unroll)
        return x, shared, kept

    def _shared(self, layout: Layout, source: Source | None) -> Any:
        """What the layers have in common about pairs of slots."""
        c = self.config
        if c.cross != (source is not None):
            raise ValueError(f"TransformerConfig.cross = {c.cross} and source = {source}")
        if layout.prefix is not None and c.attention == "hstu":
            raise ConfigError("hstu attention knows no prefix", mend="take softmax attention, or leave it out")
        if layout.parents is not None and c.relative != "none":
            raise ConfigError(
                "segments with parents lie apart from them in the row, which biases by distance would see",
                where=f"TransformerConfig.relative = {c.relative!r}",
                expected="learned or rotary positions, which go by `positions`",
            )
        if c.relative == "position_time":
            return time_buckets(layout)
        if c.relative == "t5":
            return t5_bias(self.relative_bias[...], layout.positions.shape[1], two_sided=not c.causal)
        return None

    def _added(self, prompt: Prompt, steps: int, step: ArrayLike) -> Added:
        """Masks and biases of the token at `step`."""
        slots = jnp.arange(prompt.visible.shape[1], dtype=jnp.int32)[None]
        own = jnp.arange(steps, dtype=jnp.int32)[None]
        to_prompt, to_own = unless(prompt.visible)[:, None], unless(own <= step)[:, None]
        if self.config.relative == "t5":
            table = self.relative_bias[...]
            to_prompt = to_prompt + _t5_at(table, prompt.slot[:, None] + 1 + step - slots)
            to_own = to_own + _t5_at(table, jnp.asarray(step) - own)
        source = None if prompt.source is None else unless(prompt.source.visible)[:, None]
        return Added(to_prompt, to_own, source)


def _t5_at(table: jax.Array, apart: jax.Array) -> jax.Array:
    """Biases [b, h, s] of distances [b, s], none of them to a later slot."""
    return jnp.moveaxis(jnp.take(table, t5_buckets(apart, two_sided=False), axis=1), 0, 1)


def _stacked(kept: Any) -> Any:
    return jax.tree.map(lambda x: x[None], kept)
