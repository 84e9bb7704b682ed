"""Products of pairs of fields: factorisation machines, with a tower beside them DeepFM, and DLRM's dot products."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.dense import Pass
from recjax.nn.interaction import Crossed, Inputs, InputShape, Linear
from recjax.nn.tower import Deep, TowerConfig


def pair_sum(vectors: Float[Array, "b s d"]) -> Float[Array, "b d"]:
    """sum_{i<j} v_i * v_j, as half of (square of the sum - sum of the squares) (Rendle 2010, lemma 3.1)."""
    return 0.5 * (jnp.square(vectors.sum(1)) - jnp.square(vectors).sum(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorizationMachine:
    """w_0 + sum_i w_i + sum_{i<j} <v_i, v_j>; with a `deep` tower beside it DeepFM (Guo et al. 2017, 1703.04247).

    The weights w of fields are one more column of the table. Numbers have weights and no pairs: let the model give
    them vectors (`Ranker.numeric` "vectors") where they are to take part.
    """

    deep: Deep | None = None
    first_order = True

    def make(self, inputs: InputShape, *, rngs: Rngs) -> FactorizationLayers:
        """The module."""
        return FactorizationLayers(self, inputs, rngs=rngs)


class FactorizationLayers(Module):
    """See `FactorizationMachine`."""

    def __init__(self, config: FactorizationMachine, inputs: InputShape, *, rngs: Rngs) -> None:
        zeros = nnx.initializers.zeros
        self.linear = param(rngs, (inputs.numbers,), (None,), zeros) if inputs.numbers else None
        self.deep = config.deep.make(inputs.flat, rngs=rngs) if config.deep else None
        self.width = self.deep.width if self.deep else 0

    def __call__(self, inputs: Inputs, call: Pass) -> Crossed:
        if inputs.first is None:
            raise ValueError("a factorisation machine needs Inputs.first")
        offset = inputs.first + pair_sum(inputs.vectors).sum(1)
        if self.linear is not None:
            offset = offset + inputs.numbers @ self.linear[...]
        return Crossed(self.deep(inputs.composed(), call) if self.deep else inputs.numbers[:, :0], offset)

    def output(self, *, rngs: Rngs) -> Linear | Constant:
        """The output layer of a head: with no tower, w_0 alone."""
        return Linear(self.width, rngs=rngs) if self.width else Constant(rngs=rngs)


class Constant(Module):
    """b, whatever it is given."""

    def __init__(self, *, rngs: Rngs) -> None:
        self.bias = param(rngs, (1,), (None,), nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "b o"], call: Pass) -> Float[Array, " b"]:
        return jnp.broadcast_to(self.bias[...], (x.shape[0],))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """DLRM (Naumov et al. 2019, 1906.00091): a `bottom` tower makes the numbers a vector like those of fields; the dot
    products of all pairs and that vector go to the `top` tower. Without numbers there is no bottom.

    The last width of `bottom` is that of the fields.
    """

    bottom: TowerConfig = TowerConfig(widths=(64, 16))
    top: Deep | None = dataclasses.field(default_factory=TowerConfig)
    first_order = False

    def make(self, inputs: InputShape, *, rngs: Rngs) -> DotLayers:
        """The module."""
        return DotLayers(self, inputs, rngs=rngs)


class DotLayers(Module):
    """See `Dot`."""

    def __init__(self, config: Dot, inputs: InputShape, *, rngs: Rngs) -> None:
        if inputs.numbers and config.bottom.widths[-1:] != (inputs.width,):
            raise ConfigError(
                f"Dot.bottom ends in {config.bottom.widths[-1:]}",
                expected=f"{inputs.width}, the width of the vectors of fields",
            )
        self.bottom = config.bottom.make(inputs.numbers, rngs=rngs) if inputs.numbers else None
        vectors = len(inputs.names) + bool(inputs.numbers)
        self.pairs = vectors * (vectors - 1) // 2 + inputs.width * bool(inputs.numbers)
        self.top = config.top.make(self.pairs, rngs=rngs) if config.top else None
        self.width = self.top.width if self.top else self.pairs

    def __call__(self, inputs: Inputs, call: Pass) -> Crossed:
        vectors, dense = inputs.vectors, None
        if self.bottom is not None:
            dense = self.bottom(inputs.numbers, call.part(0))
            vectors = jnp.concatenate([dense[:, None], vectors], axis=1)
        products = jnp.einsum("bsd,btd->bst", vectors, vectors)
        rows, columns = np.tril_indices(vectors.shape[1], -1)
        x = products.reshape(products.shape[0], -1)[:, rows * vectors.shape[1] + columns]
        x = x if dense is None else jnp.concatenate([dense, x], axis=1)
        return Crossed(self.top(x, call.part(1)) if self.top else x)

    def output(self, *, rngs: Rngs) -> Linear:
        """The output layer of a head."""
        return Linear(self.width, rngs=rngs)
