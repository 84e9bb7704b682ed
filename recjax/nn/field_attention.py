"""AutoInt: fields look at each other by self-attention, layer upon layer (Song et al. 2019, arXiv 1810.11921)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs
from recjax.nn.dense import Dense, Pass
from recjax.nn.interaction import Crossed, Inputs, InputShape, Linear
from recjax.nn.tower import Deep


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldAttention:
    """`layers` of relu(attention(X) + X W) over the vectors X of the fields, softmax attention without a scale in
    `heads` heads of `head_width`; all fields side by side at the end, and numbers with them. A `deep` tower may stand
    beside it (AutoInt+). Numbers have no part in attention: `FieldConfig.numeric` "vector" gives them one.
    """

    layers: int = 3
    heads: int = 2
    head_width: int = 16
    deep: Deep | None = None
    first_order = False

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FieldAttention.{name} = {getattr(self, name)}", expected="at least 1")

    def make(self, inputs: InputShape, *, rngs: Rngs) -> FieldAttentionLayers:
        """The module."""
        return FieldAttentionLayers(self, inputs, rngs=rngs)


class FieldAttentionLayers(Module):
    """See `FieldAttention`."""

    def __init__(self, config: FieldAttention, inputs: InputShape, *, rngs: Rngs) -> None:
        self.config, outer, inner = config, config.heads * config.head_width, inputs.width
        for i in range(config.layers):
            for name in ("query", "key", "value", "residual"):
                setattr(self, f"{name}{i}", Dense(inner, outer, bias=False, axes=(None, "mlp"), rngs=rngs))
            inner = outer
        self.deep = config.deep.make(inputs.flat, rngs=rngs) if config.deep else None
        self.width = len(inputs.names) * outer + inputs.numbers + (self.deep.width if self.deep else 0)

    def __call__(self, inputs: Inputs, call: Pass) -> Crossed:
        x = inputs.vectors
        for i in range(self.config.layers):
            x = jax.nn.relu(self._attend(x, i, call) + getattr(self, f"residual{i}")(x, call))
        deep = (self.deep(inputs.composed(), call),) if self.deep else ()
        return Crossed(jnp.concatenate([x.reshape(x.shape[0], -1), inputs.numbers, *deep], axis=1))

    def _attend(self, x: Float[Array, "b s i"], layer: int, call: Pass) -> Float[Array, "b s o"]:
        shape = (*x.shape[:2], self.config.heads, self.config.head_width)
        q, k, v = (getattr(self, f"{name}{layer}")(x, call).reshape(shape) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", q, k), axis=-1)
        return jnp.einsum("bhst,bthk->bshk", weights, v).reshape(*x.shape[:2], -1)

    def output(self, *, rngs: Rngs) -> Linear:
        """The output layer of a head."""
        return Linear(self.width, rngs=rngs)
