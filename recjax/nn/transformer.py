"""The one transformer: a stack of equal blocks described by a frozen config.

T5 1.1, Llama, SASRec, BERT4Rec, LSRM, HSTU and eSASRec are rows of the table that `TransformerConfig` spans. The stack
works on vectors; the tables at its two ends (items, learned positions) belong to the models.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recjax.core.module import Module, Rngs, one, param, scan, some, stack
from recjax.core.sharding import constrain
from recjax.nn.config import TransformerConfig, initializers
from recjax.nn.dropout import dropout
from recjax.nn.ffn import FeedForward
from recjax.nn.heads import PointwiseAttention, SoftmaxAttention, take_slots
from recjax.nn.layout import Layout
from recjax.nn.linear import linear
from recjax.nn.norm import Norm
from recjax.nn.relative import time_buckets

__all__ = ["Block", "Transformer", "TransformerConfig"]

INIT_STD = 0.02


class Gate(Module):
    """sigmoid(x W + b), by which what is added to x is multiplied."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        width = config.width
        self.weight = param(rngs, (width, width), ("embed", None), initializers(config)[0])
        self.bias = param(rngs, (width,), (None,), nnx.initializers.zeros) if config.bias else None

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Between 0 and 1, of the dtype of `x`."""
        return jax.nn.sigmoid(linear(x, self.weight[...], None if self.bias is None else self.bias[...]))


class Block(Module):
    """Attention and, unless `ffn` is "none", feed-forward, each added to the stream, normalised before or after."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init, out_init = initializers(c)
        make_norm = functools.partial(Norm, kind=c.norm, width=c.width, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)
        is_gated = c.residual == "gated"
        self.attention_norm = make_norm()
        self.attention = (SoftmaxAttention if c.attention == "softmax" else PointwiseAttention)(c, rngs=rngs)
        self.attention_gate = Gate(c, rngs=rngs) if is_gated else None
        if c.ffn != "none":
            self.ffn_norm = make_norm()
            self.ffn = FeedForward(
                kind=c.ffn, width=c.width, mlp_width=c.inner_width, bias=c.bias, init=init, out_init=out_init, rngs=rngs
            )
            self.ffn_gate = Gate(c, rngs=rngs) if is_gated else None

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: Any, rate: Any, keys: Any
    ) -> Float[Array, "b l d"]:
        """`rate` is the residual dropout of this layer, `keys` its three dropout keys or None when not training;
        `buckets` are those of the time between slots, where the config looks at time."""
        c = self.config
        attention_key, out_key, ffn_key = (None,) * 3 if keys is None else keys
        rate = rate if any(c.dropout_rates) else 0.0

        def attention(y: jax.Array) -> jax.Array:
            if c.attention == "hstu":
                return self.attention(y, layout, buckets, rate, attention_key)
            y = self.attention(y, layout, buckets, c.attention_dropout, attention_key)
            return y if out_key is None else dropout(y, rate, out_key)

        def feed_forward(y: jax.Array) -> jax.Array:
            y = self.ffn(y)
            return y if ffn_key is None else dropout(y, rate, ffn_key)

        x = self._add(x, attention, self.attention_norm, self.attention_gate)
        if c.ffn != "none":
            x = self._add(x, feed_forward, self.ffn_norm, self.ffn_gate)
        return constrain(x, "batch", "length", None)

    def at(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: Any, slots: Int[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """What calling it gives at some slots when not training; only they go through what follows the attention."""

        def attention(_: jax.Array) -> jax.Array:
            return self.attention.at(x if c.place == "post" else self.attention_norm(x), layout, buckets, slots)

        c = self.config
        here = self._add(take_slots(x, slots), attention, self.attention_norm, self.attention_gate)
        return here if c.ffn == "none" else self._add(here, self.ffn, self.ffn_norm, self.ffn_gate)

    def _add(self, x: jax.Array, part: Any, norm: Norm, gate: Gate | None) -> jax.Array:
        if self.config.place == "post":
            return norm(x + part(x))
        return x + part(norm(x)) if gate is None else x + gate(x) * part(norm(x))


class Transformer(Module):
    """`num_layers` blocks and a final norm."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        self.layers = stack(lambda r: Block(c, rngs=r), c.num_layers, rngs)
        self.final_norm = Norm(kind=c.norm, width=c.width, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        layout: Layout,
        *,
        train: bool,
        key: Key[Array, ""] | None,
        query_at: Int[Array, "b q"] | None = None,
    ) -> Float[Array, "b _ d"]:
        """Contextual vectors, normalised; `key` seeds the dropout and may be None when not training.

        With `query_at` (not when training) only the vectors at those slots, [b, q, d]: the last block, which nothing
        comes after, is then made for them alone.
        """
        c = self.config
        x = x.astype(c.dtype)
        rates = jnp.asarray(c.dropout_rates, jnp.float32)
        keys = jax.random.split(key, (c.num_layers, 3)) if train and key is not None else None
        buckets = time_buckets(layout) if c.relative == "position_time" else None

        def call(block: Block, x: jax.Array, per_layer: Any) -> jax.Array:
            rate, layer_keys = per_layer
            return block(x, layout, buckets, rate, layer_keys)

        unroll = c.num_layers <= 4 if c.unroll is None else c.unroll
        if query_at is not None:
            last = c.num_layers - 1
            x = scan(some(self.layers, 0, last), call, x, (rates[:last], None), unroll=unroll) if last else x
            last_block: Any = one(self.layers, last)
            return self.final_norm(last_block.at(x, layout, buckets, query_at))
        x = scan(self.layers, call, x, (rates, keys), remat=c.remat == "full", unroll=unroll)
        return self.final_norm(x)
