"""Explicit crosses of bounded degree: DCNv2 with whole matrices, of low rank, and as a mixture of low-rank experts.

Wang et al. 2021, arXiv 2008.13535. With a `ResidualConfig` beside the crosses it is the ranker of UniCoRn as its spec
card has it (the paper names residual connections and feature crossing and gives no sizes).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.composed import Composed
from recjax.nn.dense import Dense, Pass
from recjax.nn.interaction import Crossed, Inputs, InputShape, Linear
from recjax.nn.tower import Deep, TowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
    """`layers` of x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, and a `deep` tower.

    `structure` "parallel": the tower reads x_0 and stands beside the crosses; "stacked": it reads what they made.
    With `rank`, W = V U of that rank; with several `experts` as well, x_0 * (E_i(x) + b) is mixed by a softmax over
    x g_i, E_i(x) = tanh(tanh(x V_i) C_i) U_i. The gates g are shared by the layers, as in the code of FuxiCTR and
    DeepCTR.
    """

    layers: int = 3
    rank: int | None = None
    experts: int = 1
    deep: Deep | None = dataclasses.field(default_factory=TowerConfig)
    structure: Literal["parallel", "stacked"] = "parallel"
    first_order = False

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"Cross.{name} = {getattr(self, name)}", expected="at least 1")
        if self.experts > 1 and self.rank is None:
            raise ConfigError(f"Cross.experts = {self.experts} without a rank", mend="set Cross.rank, such as 32")
        if self.structure not in ("parallel", "stacked"):
            raise ConfigError(f"no structure {self.structure!r}", expected="parallel, stacked")

    def make(self, inputs: InputShape, *, rngs: Rngs) -> CrossLayers:
        """The module."""
        return CrossLayers(self, inputs, rngs=rngs)


class CrossLayers(Module):
    """See `Cross`."""

    def __init__(self, config: Cross, inputs: InputShape, *, rngs: Rngs) -> None:
        self.config, width = config, inputs.flat
        if config.experts > 1:
            self.gate = Dense(width, config.experts, bias=False, rngs=rngs)
        for i in range(config.layers):
            if config.experts > 1:
                layer: Module = CrossExperts(config, width, rngs=rngs)
            elif config.rank is not None:
                layer = LowRank(width, config.rank, rngs=rngs)
            else:
                layer = Dense(width, width, rngs=rngs)
            setattr(self, f"cross{i}", layer)
        self.deep = config.deep.make(width, rngs=rngs) if config.deep else None
        deep = self.deep.width if self.deep else 0
        self.width = (deep or width) if config.structure == "stacked" else width + deep

    def __call__(self, inputs: Inputs, call: Pass) -> Crossed:
        first = x = inputs.flat()
        for i in range(self.config.layers):
            layer = getattr(self, f"cross{i}")
            if self.config.experts > 1:
                x = first * layer(x, jax.nn.softmax(self.gate(x, call), axis=-1)) + x
            else:
                x = first * layer(x if i else inputs.composed(), call) + x
        if self.deep is None:
            return Crossed(x)
        if self.config.structure == "stacked":
            return Crossed(self.deep(x, call))
        return Crossed(jnp.concatenate([x, self.deep(inputs.composed(), call)], axis=1))

    def output(self, *, rngs: Rngs) -> Linear:
        """The output layer of a head."""
        return Linear(self.width, rngs=rngs)


class LowRank(Module):
    """(x V) U + b."""

    def __init__(self, width: int, rank: int, *, rngs: Rngs) -> None:
        self.down = Dense(width, rank, bias=False, rngs=rngs)
        self.up = Dense(rank, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"] | Composed, call: Pass) -> Float[Array, "b i"]:
        return self.up(self.down(x, call), call)


class CrossExperts(Module):
    """sum_i p_i (tanh(tanh(x V_i) C_i) U_i) + b, for weights p [b, e] that sum to one."""

    def __init__(self, config: Cross, width: int, *, rngs: Rngs) -> None:
        experts, rank, glorot = config.experts, config.rank or 0, nnx.initializers.glorot_normal(batch_axis=(0,))
        self.down = param(rngs, (experts, width, rank), (None, None, None), glorot)
        self.core = param(rngs, (experts, rank, rank), (None, None, None), glorot)
        self.up = param(rngs, (experts, rank, width), (None, None, None), glorot)
        self.bias = param(rngs, (width,), (None,), nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "b i"], mix: Float[Array, "b e"]) -> Float[Array, "b i"]:
        experts, width, rank = self.down.shape
        # As two plain products: all experts down at once, and up with the mixture applied in the narrow space.
        hidden = jnp.tanh(x @ self.down[...].swapaxes(0, 1).reshape(width, -1)).reshape(-1, experts, rank)
        hidden = jnp.tanh(jnp.einsum("ber,ers->bes", hidden, self.core[...])) * mix[..., None]
        return hidden.reshape(-1, experts * rank) @ self.up[...].reshape(-1, width) + self.bias[...][None]
