"""Stacks of dense layers as rankers have them: batch or layer norm, activations that adapt to the data, residuals.

A batch norm normalises by its batch in training and by running moments otherwise. It keeps no state of its own: what
it saw goes into `Pass.seen`, and the model that contains it passes `moved` on from its `maintain`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.composed import Composed
from recjax.nn.dense import Dense, Pass
from recjax.nn.norm import Norm

Activation = Literal["relu", "sigmoid", "tanh", "gelu", "dice", "none"]
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "none": lambda x: x,
}
_EPSILON = 1e-5


class Running(Module):
    """A norm with running moments; `path` is where in the model it is."""

    path = ""

    def moved(self, seen: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The running moments, by path, after a step whose micro-batches have `seen` [n, ...] these; nothing where
        they have not met this norm."""
        raise NotImplementedError


class BatchNorm(Running):
    """(x - mean) / sd over all but the last dimension, times `scale` plus `bias` where it is `affine`.

    (Ioffe and Szegedy 2015.) Running moments are those of the first batch, then means of all batches, and move by
    `momentum` once more than 1 / `momentum` have been seen: what they began with is forgotten at once. Moments that
    always moved by `momentum` would stay near a variance of 1 for hundreds of batches where activations are small. The
    variance among them is the unbiased one.
    """

    def __init__(
        self, width: int, *, affine: bool = True, epsilon: float = _EPSILON, momentum: float = 0.1, rngs: Rngs
    ) -> None:
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        self.epsilon, self.momentum = epsilon, momentum
        self.mean = param(rngs, (width,), (None,), zeros, trained=False)
        self.variance = param(rngs, (width,), (None,), ones, trained=False)
        self.batches = param(rngs, (), (), zeros, trained=False)
        self.scale = param(rngs, (width,), (None,), ones) if affine else None
        self.bias = param(rngs, (width,), (None,), zeros) if affine else None

    def __call__(self, x: Float[Array, "b *n o"], call: Pass) -> Float[Array, "b *n o"]:
        rows = x.reshape(-1, x.shape[-1])
        mean, variance = self.mean[...], self.variance[...]
        if call.train:
            mean = rows.mean(0)
            variance = jnp.square(rows - mean[None]).mean(0)
            unbiased = variance * (rows.shape[0] / max(rows.shape[0] - 1, 1))
            call.seen[f"{self.path}/mean"], call.seen[f"{self.path}/variance"] = mean, unbiased
        factor = jax.lax.rsqrt(variance + self.epsilon)
        factor = factor if self.scale is None else factor * self.scale[...]
        y = (rows - mean[None]) * factor[None]
        return (y if self.bias is None else y + self.bias[...][None]).reshape(x.shape)

    def moved(self, seen: Mapping[str, Any]) -> dict[str, jax.Array]:
        """See `Running`."""
        if f"{self.path}/mean" not in seen:
            return {}
        batches = self.batches[...] + 1
        share, values = jnp.maximum(self.momentum, 1 / batches), {f"{self.path}/batches": batches}
        for name in ("mean", "variance"):
            path = f"{self.path}/{name}"
            values[path] = (1 - share) * getattr(self, name)[...] + share * seen[path].mean(0)
        return values


def name_norms(module: Module) -> None:
    """Tell every norm with running moments where in the model it is."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, Running):
            node.path = "/".join(map(str, path))


def moved(module: Module, seen: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The running moments of all norms of a model, by path, after a step whose micro-batches have `seen` these."""
    values: dict[str, jax.Array] = {}
    for _, node in nnx.iter_graph(module):
        values |= node.moved(seen) if isinstance(node, Running) else {}
    return values


class Dice(Module):
    """p x + a (1 - p) x with p = sigmoid((x - mean) / sd) and a learned a, 0 at first (DIN, arXiv 1706.06978)."""

    def __init__(self, width: int, *, rngs: Rngs) -> None:
        self.norm = BatchNorm(width, affine=False, epsilon=1e-9, momentum=0.01, rngs=rngs)
        self.alpha = param(rngs, (width,), (None,), nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "b *n o"], call: Pass) -> Float[Array, "b *n o"]:
        p = jax.nn.sigmoid(self.norm(x, call))
        alpha = self.alpha[...].reshape(*(1,) * (x.ndim - 1), -1)
        return p * x + alpha * (1 - p) * x


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Hidden layers of these `widths`, each act(norm(x W + b)) with `dropout` behind it.

    In a layer with adapters dropout comes before the activation and leaves the adapters alone, as MLoRA has it.
    """

    widths: tuple[int, ...] = (256, 128, 64)
    activation: Activation = "relu"
    norm: Literal["none", "batch", "layer"] = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.widths):
            raise ConfigError(f"TowerConfig.widths = {self.widths}", expected="widths of at least 1")
        if self.activation not in (*ACTIVATIONS, "dice"):
            raise ConfigError(f"no activation {self.activation!r}", expected=", ".join((*ACTIVATIONS, "dice")))
        if self.norm not in ("none", "batch", "layer"):
            raise ConfigError(f"no norm {self.norm!r}", expected="none, batch, layer")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"TowerConfig.dropout = {self.dropout}", expected="a rate in [0, 1)")

    def make(self, inputs: int, *, rngs: Rngs) -> Tower:
        """The stack, for vectors of `inputs` numbers."""
        return Tower(self, inputs, rngs=rngs)


class Tower(Module):
    """See `TowerConfig`; with no layers the identity. `width` is that of the output."""

    def __init__(self, config: TowerConfig, inputs: int, *, rngs: Rngs) -> None:
        widths = (inputs, *config.widths)
        self.config, self.width = config, widths[-1]
        for i, (inner, outer) in enumerate(pairwise(widths)):
            # Every other width is split over devices, so that layer after layer only activations travel.
            axes = (None, "mlp") if i % 2 == 0 else ("mlp", None)
            setattr(self, f"layer{i}", Dense(inner, outer, axes=axes, rngs=rngs))
            if config.norm == "batch":
                setattr(self, f"norm{i}", BatchNorm(outer, rngs=rngs))
            elif config.norm == "layer":
                setattr(self, f"norm{i}", Norm(kind="layer", width=outer, bias=True, epsilon=_EPSILON, rngs=rngs))
            if config.activation == "dice":
                setattr(self, f"dice{i}", Dice(outer, rngs=rngs))

    def __call__(self, x: Float[Array, "b *n i"] | Composed, call: Pass) -> Float[Array, "b *n o"]:
        config = self.config
        for i in range(len(config.widths)):
            layer, own = getattr(self, f"layer{i}"), call.part(i)
            y: jax.Array = layer(x, own, dropout=config.dropout if layer.adapted else 0.0)
            if config.norm != "none":
                y = getattr(self, f"norm{i}")(y, *((own,) if config.norm == "batch" else ()))
            y = getattr(self, f"dice{i}")(y, own) if config.activation == "dice" else ACTIVATIONS[config.activation](y)
            x = y if layer.adapted else own.dropout(y, config.dropout)
        return x.whole() if isinstance(x, Composed) else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """h_0 = x W, then `blocks` times h + W_2 relu(W_1 layernorm(h)), all of one `width`, with `dropout` on the sums."""

    blocks: int = 3
    width: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.width < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"ResidualConfig: {self.blocks} blocks of width {self.width}, dropout {self.dropout}",
                expected="at least 1 block, a width of at least 1, a rate in [0, 1)",
            )

    def make(self, inputs: int, *, rngs: Rngs) -> ResidualTower:
        """The stack, for vectors of `inputs` numbers."""
        return ResidualTower(self, inputs, rngs=rngs)


class ResidualTower(Module):
    """See `ResidualConfig`."""

    def __init__(self, config: ResidualConfig, inputs: int, *, rngs: Rngs) -> None:
        self.config, self.width = config, config.width
        self.project = Dense(inputs, config.width, rngs=rngs)
        for i in range(config.blocks):
            norm = Norm(kind="layer", width=config.width, bias=True, epsilon=_EPSILON, rngs=rngs)
            setattr(self, f"norm{i}", norm)
            setattr(self, f"inner{i}", Dense(config.width, config.width, axes=(None, "mlp"), rngs=rngs))
            setattr(self, f"outer{i}", Dense(config.width, config.width, axes=("mlp", None), rngs=rngs))

    def __call__(self, x: Float[Array, "b i"] | Composed, call: Pass) -> Float[Array, "b o"]:
        x = self.project(x, call)
        for i in range(self.config.blocks):
            inner = jax.nn.relu(getattr(self, f"inner{i}")(getattr(self, f"norm{i}")(x), call))
            x = x + call.part(i).dropout(getattr(self, f"outer{i}")(inner, call), self.config.dropout)
        return x


Deep = TowerConfig | ResidualConfig
