"""The attention part of HSTU: gates, values, queries and keys in one product, mixed pointwise.

The kernel is in `recjax.nn.pointwise`, the part of other transformers in `recjax.nn.heads`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recjax.core.module import Module, Rngs, param
from recjax.core.sharding import constrain
from recjax.nn.config import TransformerConfig, initializers
from recjax.nn.dropout import dropout
from recjax.nn.layout import Layout
from recjax.nn.linear import linear
from recjax.nn.norm import Norm
from recjax.nn.pointwise import attend_pointwise, attend_pointwise_at
from recjax.nn.projections import project, take_slots, turn
from recjax.nn.relative import NUM_BUCKETS, by_bucket, by_distance

_AXES = ("embed", "heads", "head_dim")
_BIAS_STD = 0.02


class PointwiseAttention(Module):
    """HSTU (Zhai et al. 2024, arXiv 2402.17152, section 3.1): u, v, q, k = silu(x W); W_out(norm(A v) * u).

    A is pointwise attention with biases by distance and time. The norm is over all heads together; only norms and
    the output have biases, and dropout is before the output weights, as in the code of the authors.
    """

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init = initializers(c)
        normal, shape = nnx.initializers.normal(_BIAS_STD), (c.width, c.num_heads, c.head_width)
        self.gate, self.value, self.query, self.key = (param(rngs, shape, _AXES, init.inner) for _ in range(4))
        self.out = param(rngs, (*shape[1:], c.width), ("heads", "head_dim", "embed"), init.outer)
        self.out_bias = param(rngs, (c.width,), (None,), nnx.initializers.zeros) if c.bias else None
        inner = c.num_heads * c.head_width
        self.out_norm = Norm(kind=c.norm, width=inner, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)
        by_position, by_time = c.relative != "none", c.relative == "position_time"
        self.position_bias = param(rngs, (c.max_length,), (None,), normal) if by_position else None
        self.time_bias = param(rngs, (NUM_BUCKETS,), (None,), normal) if by_time else None

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: Int[Array, "b l l"] | None, rate: Any, key: Any
    ) -> tuple[Float[Array, "b l d"], None]:
        """The outcome; nothing is kept for later tokens.

        `rate` is the dropout of what is added to the stream and `key` its key, None when not training.
        """
        c = self.config
        weights = [w[...] for w in (self.gate, self.value, self.query, self.key)]
        u, v, q, k = project(x, weights, [], act=jax.nn.silu)
        q, k = turn(c, q, layout.positions), turn(c, k, layout.positions)
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
        return self._close(mixed, u, rate, key), None

    def at(
        self, x: Float[Array, "b l d"], layout: Layout, buckets: Int[Array, "b l l"] | None, slots: Int[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """What calling it gives at some slots, without dropout and without making the rest."""
        c = self.config
        v, k = project(x, [self.value[...], self.key[...]], [], act=jax.nn.silu)
        u, q = project(take_slots(x, slots), [self.gate[...], self.query[...]], [], act=jax.nn.silu)
        q = turn(c, q, jnp.take_along_axis(layout.positions, slots, axis=1))
        k = turn(c, k, layout.positions)
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
