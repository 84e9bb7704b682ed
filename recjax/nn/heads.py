"""The attention part of a block: from the stream to heads, through a kernel, and back.

Projections, rotary positions and gates; the kernels are in `recjax.nn.attention` and `recjax.nn.pointwise`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recjax.core.module import Module, Rngs, param
from recjax.core.sharding import active, constrain
from recjax.nn.attention import attend, attend_library, product, weights_at
from recjax.nn.config import TransformerConfig, initializers
from recjax.nn.dropout import dropout
from recjax.nn.layout import Layout
from recjax.nn.linear import linear
from recjax.nn.norm import Norm
from recjax.nn.pointwise import attend_pointwise, attend_pointwise_at
from recjax.nn.relative import NUM_BUCKETS, by_bucket, by_distance
from recjax.nn.rotary import rotary

_AXES = ("embed", "heads", "head_dim")
_BIAS_STD = 0.02


class SoftmaxAttention(Module):
    """Multi-head self-attention within segments."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init, out_init = initializers(c)
        zeros = nnx.initializers.zeros
        heads, groups, width = c.num_heads, c.kv_heads, c.head_width
        self.query = param(rngs, (c.width, heads, width), _AXES, init)
        self.key = param(rngs, (c.width, groups, width), _AXES, init)
        self.value = param(rngs, (c.width, groups, width), _AXES, init)
        self.out = param(rngs, (heads, width, c.width), ("heads", "head_dim", "embed"), out_init)
        if c.bias:
            self.query_bias = param(rngs, (heads, width), _AXES[1:], zeros)
            self.key_bias = param(rngs, (groups, width), _AXES[1:], zeros)
            self.value_bias = param(rngs, (groups, width), _AXES[1:], zeros)
            self.out_bias = param(rngs, (c.width,), (None,), zeros)

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: None, rate: Any, key: Any
    ) -> Float[Array, "b l d"]:
        """`rate` is the dropout of the attention weights and `key` its key, None when not training."""
        c = self.config
        biases = (self.query_bias, self.key_bias, self.value_bias) if c.bias else ()
        q, k, v = _project(x, [w[...] for w in (self.query, self.key, self.value)], [b[...] for b in biases])
        if "rotary" in c.position:
            q, k = rotary(q, layout.positions), rotary(k, layout.positions)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        if c.kernel == "library":
            out = attend_library(q, k, v, layout.segments, causal=c.causal)
        else:
            out = attend(q, k, v, layout.segments, causal=c.causal, dropout=rate, key=key)
        out = out.reshape(*x.shape[:2], -1)
        return linear(out, self.out[...].reshape(-1, c.width), self.out_bias[...] if c.bias else None)

    def at(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: None, slots: Int[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """What calling it gives at some slots, without dropout and without making the rest.

        Few queries: their scores q . (x W_k) are (q W_k^T) . x, and a mean of values is the value of a mean, so neither
        keys nor values are made. (The bias of the keys adds the same to all scores of a query. Keys that are turned by
        their position have to be made.)
        """
        c = self.config
        count, groups = slots.shape[1], c.kv_heads
        biases = [self.query_bias[...]] if c.bias else []
        [q] = _project(take_slots(x, slots), [self.query[...]], biases)
        if "rotary" in c.position:
            q = rotary(q, jnp.take_along_axis(layout.positions, slots, axis=1))
        q = (q * jnp.asarray(c.head_width**-0.5, q.dtype)).reshape(
            -1, count, groups, c.num_heads // groups, c.head_width
        )
        if "rotary" in c.position:
            [k] = _project(x, [self.key[...]], [self.key_bias[...]] if c.bias else [])
            scores = product("bqgrk,bsgk->bgrqs", q, rotary(k, layout.positions))
        else:
            turned = product("bqgrk,dgk->bqgrd", q, self.key[...].astype(x.dtype)).astype(x.dtype)
            scores = product("bqgrd,bsd->bgrqs", turned, x)
        flat = scores.reshape(len(x), c.num_heads, count, -1)
        weights = weights_at(flat, layout.segments, slots, causal=c.causal).astype(x.dtype).reshape(scores.shape)
        mixed = product("bgrqs,bsd->bqgrd", weights, x).astype(x.dtype)
        out = product("bqgrd,dgk->bqgrk", mixed, self.value[...].astype(x.dtype))
        if c.bias:
            out = out + self.value_bias[...][None, None, :, None]
        out = out.astype(x.dtype).reshape(*slots.shape, -1)
        return linear(out, self.out[...].reshape(-1, c.width), self.out_bias[...] if c.bias else None)


class PointwiseAttention(Module):
    """HSTU (Zhai et al. 2024, arXiv 2402.17152, section 3.1): u, v, q, k = silu(x W); W_out(norm(A v) * u).

    A is pointwise attention with biases by distance and time. The norm is over all heads together; only norms and
    the output have biases, and dropout is before the output weights, as in the code of the authors.
    """

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init, out_init = initializers(c)
        normal, shape = nnx.initializers.normal(_BIAS_STD), (c.width, c.num_heads, c.head_width)
        self.gate, self.value, self.query, self.key = (param(rngs, shape, _AXES, init) for _ in range(4))
        self.out = param(rngs, (*shape[1:], c.width), ("heads", "head_dim", "embed"), out_init)
        self.out_bias = param(rngs, (c.width,), (None,), nnx.initializers.zeros) if c.bias else None
        inner = c.num_heads * c.head_width
        self.out_norm = Norm(kind=c.norm, width=inner, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)
        by_position, by_time = c.relative != "none", c.relative == "position_time"
        self.position_bias = param(rngs, (c.max_length,), (None,), normal) if by_position else None
        self.time_bias = param(rngs, (NUM_BUCKETS,), (None,), normal) if by_time else None

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: Int[Array, "b l l"] | None, rate: Any, key: Any
    ) -> Float[Array, "b l d"]:
        """`rate` is the dropout of what is added to the stream and `key` its key, None when not training."""
        c = self.config
        weights = [w[...] for w in (self.gate, self.value, self.query, self.key)]
        u, v, q, k = _project(x, weights, [], act=jax.nn.silu)
        if "rotary" in c.position:
            q, k = rotary(q, layout.positions), rotary(k, layout.positions)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        mixed = attend_pointwise(
            q,
            k,
            v,
            layout.segments,
            length=c.max_length,
            distance_bias=None if self.position_bias is None else by_distance(self.position_bias[...], x.shape[1]),
            time_bias=None if self.time_bias is None else self.time_bias[...],
            buckets=buckets,
        )
        return self._close(mixed, u, rate, key)

    def at(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: Int[Array, "b l l"] | None, slots: Int[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """What calling it gives at some slots, without dropout and without making the rest."""
        c = self.config
        v, k = _project(x, [self.value[...], self.key[...]], [], act=jax.nn.silu)
        u, q = _project(take_slots(x, slots), [self.gate[...], self.query[...]], [], act=jax.nn.silu)
        if "rotary" in c.position:
            place = jnp.take_along_axis(layout.positions, slots, axis=1)
            q, k = rotary(q, place), rotary(k, layout.positions)
        bias = jnp.zeros((), jnp.float32)
        if self.position_bias is not None:
            bias = jnp.take(by_distance(self.position_bias[...], x.shape[1]), slots, axis=0)
        if self.time_bias is not None and buckets is not None:
            bias = bias + by_bucket(self.time_bias[...], jnp.take_along_axis(buckets, slots[..., None], axis=1))
        mixed = attend_pointwise_at(q, k, v, layout.segments, slots, bias, length=c.max_length)
        return self._close(mixed, u, 0.0, None)

    def _close(self, mixed: jax.Array, u: jax.Array, rate: Any, key: Any) -> jax.Array:
        """From heads back to the stream."""
        flat = (*mixed.shape[:2], mixed.shape[2] * mixed.shape[3])
        gated = self.out_norm(mixed.reshape(flat)) * u.reshape(flat)
        if key is not None:
            gated = dropout(gated, rate, key)
        bias = None if self.out_bias is None else self.out_bias[...]
        return linear(gated, self.out[...].reshape(-1, self.config.width), bias)


def take_slots(x: Float[Array, "b l d"], slots: Int[Array, "b q"]) -> Float[Array, "b q d"]:
    """The vectors at some slots of each row."""
    return jnp.take_along_axis(x, slots[..., None], axis=1)


def _project(
    x: jax.Array,
    weights: list[jax.Array],
    biases: list[jax.Array],
    act: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> list[jax.Array]:
    """[b, l, heads, k] for each of the weights [d, heads, k]; one product unless the heads lie on several devices."""
    mesh = active()
    if mesh is not None and mesh.size_of("heads") > 1:
        return [act(_heads(x, w, b)) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    ends = [sum(w.shape[1] for w in weights[: i + 1]) for i in range(len(weights) - 1)]
    y = act(_heads(x, jnp.concatenate(weights, axis=1), jnp.concatenate(biases) if biases else None))
    return jnp.split(y, ends, axis=2)


def _heads(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[b, l, h, k] from weights [d, h, k]."""
    flat = linear(x, weight.reshape(x.shape[-1], -1), None if bias is None else bias.reshape(-1))
    return flat.reshape(*x.shape[:2], *weight.shape[1:])
