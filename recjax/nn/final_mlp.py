"""FinalMLP: two towers over gated fields, fused by a bilinear form (Mao et al. 2023, arXiv 2304.00902)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.dense import Dense, Pass
from recjax.nn.interaction import Crossed, Inputs, InputShape
from recjax.nn.tower import TowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalMlp:
    """Two streams: `first` and `second` towers over the input times a gate, 2 sigmoid(mlp(context)), of their own.

    The context of a gate are the vectors of some fields (`first_context`, `second_context`), or a learned one without
    any. (The published code has tables of their own for it; here it is the fields' own vectors.) `gate` None leaves
    the gates out. A head without layers is w_x x + w_y y + b + sum over `fusion_heads` parts h of x_h W_h y_h.
    """

    first: TowerConfig = TowerConfig(widths=(400, 400, 400))
    second: TowerConfig = TowerConfig(widths=(400, 400, 400))
    gate: TowerConfig | None = dataclasses.field(default_factory=lambda: TowerConfig(widths=(64,)))
    first_context: tuple[str, ...] = ()
    second_context: tuple[str, ...] = ()
    fusion_heads: int = 1
    first_order = False

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            widths = getattr(self, name).widths
            if not widths or self.fusion_heads < 1 or widths[-1] % self.fusion_heads:
                raise ConfigError(
                    f"FinalMlp.{name} has widths {widths} and fusion_heads = {self.fusion_heads}",
                    expected="a last width that divides into so many parts",
                )

    def make(self, inputs: InputShape, *, rngs: Rngs) -> FinalMlpLayers:
        """The module."""
        return FinalMlpLayers(self, inputs, rngs=rngs)


class FinalMlpLayers(Module):
    """See `FinalMlp`; the output is both streams side by side."""

    def __init__(self, config: FinalMlp, inputs: InputShape, *, rngs: Rngs) -> None:
        self.config, flat = config, inputs.flat
        gate = config.gate
        self.first_gate = FieldGate(gate, config.first_context, inputs, rngs=rngs) if gate else None
        self.second_gate = FieldGate(gate, config.second_context, inputs, rngs=rngs) if gate else None
        self.first, self.second = config.first.make(flat, rngs=rngs), config.second.make(flat, rngs=rngs)
        self.width = self.first.width + self.second.width

    def __call__(self, inputs: Inputs, call: Pass) -> Crossed:
        streams = []
        for number, (gate, tower) in enumerate(((self.first_gate, self.first), (self.second_gate, self.second))):
            own = call.part(number)
            streams.append(tower(inputs.composed() if gate is None else inputs.flat() * gate(inputs, own), own))
        return Crossed(jnp.concatenate(streams, axis=1))

    def output(self, *, rngs: Rngs) -> Fusion:
        """The output layer of a head."""
        return Fusion(self.first.width, self.second.width, self.config.fusion_heads, rngs=rngs)


class FieldGate(Module):
    """A factor in (0, 2) for every input."""

    def __init__(self, config: TowerConfig, context: tuple[str, ...], inputs: InputShape, *, rngs: Rngs) -> None:
        self.places = inputs.places(context)
        zeros = nnx.initializers.zeros
        self.context = None if context else param(rngs, (inputs.width,), (None,), zeros)
        self.tower = config.make(inputs.width * max(1, len(context)), rngs=rngs)
        self.out = Dense(self.tower.width, inputs.flat, rngs=rngs)

    def __call__(self, inputs: Inputs, call: Pass) -> Float[Array, "b i"]:
        rows = inputs.vectors.shape[0]
        if self.context is not None:
            x = jnp.broadcast_to(self.context[...][None], (rows, self.context.shape[0]))
        else:
            x = inputs.vectors[:, jnp.asarray(self.places)].reshape(rows, -1)
        return 2 * jax.nn.sigmoid(self.out(self.tower(x, call), call))


class Fusion(Module):
    """w_x x + w_y y + b + sum_h x_h W_h y_h over h equal parts of x and y, which come side by side."""

    def __init__(self, first: int, second: int, heads: int, *, rngs: Rngs) -> None:
        self.first, self.heads = first, heads
        self.linear = Dense(first + second, 1, rngs=rngs)
        shape = (heads, first // heads, second // heads)
        self.bilinear = param(rngs, shape, (None, None, None), nnx.initializers.glorot_normal(batch_axis=(0,)))

    def __call__(self, x: Float[Array, "b o"], call: Pass) -> Float[Array, " b"]:
        first, second = (part.reshape(x.shape[0], self.heads, -1) for part in jnp.split(x, [self.first], axis=1))
        products = jnp.einsum("bhi,hij->bhj", first, self.bilinear[...]) * second
        return self.linear(x, call)[:, 0] + products.sum((1, 2))
