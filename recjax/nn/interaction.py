"""What an interaction is: the part of a ranker that turns the vectors of its fields into one.

A config has `make(inputs, rngs=)`, `inputs` being an `InputShape`. What it makes is called with `Inputs` and a `Pass`
and gives `Crossed`; it says how wide its output is (`width`), and makes the output layer of a head that has no layers
of its own (`output`). The simplest is here: `Flat`, a tower over everything side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs
from recjax.nn.composed import Shared
from recjax.nn.dense import Dense, Pass
from recjax.nn.tower import Deep


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputShape:
    """`names` of the fields that come as vectors of `width`, and how many `numbers` come beside them."""

    names: tuple[str, ...]
    width: int
    numbers: int = 0

    @property
    def flat(self) -> int:
        """All of them side by side."""
        return len(self.names) * self.width + self.numbers

    def places(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Where fields are among all; `ConfigError` for one that is not there."""
        if unknown := [name for name in names if name not in self.names]:
            raise ConfigError(f"no field {', '.join(unknown)} with a vector", expected=", ".join(self.names))
        return tuple(self.names.index(name) for name in names)


class Alike(NamedTuple):
    """Which of the fields (`vectors`, `numbers`: their places) are alike in all rows of one of `contexts` contexts;
    that of row k is `owner[k]`."""

    owner: Int[Array, " b"]
    contexts: int
    vectors: tuple[int, ...]
    numbers: tuple[int, ...]


class Inputs(NamedTuple):
    """`vectors` [b, s, d] of the fields, `numbers` [b, c], and `first` [b], the sum of the fields' own weights.

    `first` is there for an interaction that asks for it (`first_order`), `alike` where rows share contexts.
    """

    vectors: Float[Array, "b s d"]
    numbers: Float[Array, "b c"]
    first: Float[Array, " b"] | None = None
    alike: Alike | None = None

    def flat(self) -> Float[Array, "b i"]:
        """Field after field, then the numbers."""
        flat = self.vectors.reshape(self.vectors.shape[0], -1)
        return jnp.concatenate([flat, self.numbers], axis=1) if self.numbers.shape[1] else flat

    def composed(self) -> Float[Array, "b i"] | Shared:
        """`flat` for a dense layer, which makes products with what is alike in many rows once."""
        flat, alike = self.flat(), self.alike
        if alike is None or not (alike.vectors or alike.numbers):
            return flat
        _, fields, width = self.vectors.shape
        places = [s * width + k for s in alike.vectors for k in range(width)] + [
            fields * width + k for k in alike.numbers
        ]
        return Shared(flat, alike.owner, alike.contexts, tuple(places))


class Crossed(NamedTuple):
    """`hidden` [b, o] is what heads read; `offset` [b], where there is one, is added to all of their logits."""

    hidden: Float[Array, "b o"]
    offset: Float[Array, " b"] | None = None


@runtime_checkable
class Interaction(Protocol):
    """A config of an interaction."""

    first_order: bool

    def make(self, inputs: InputShape, *, rngs: Rngs) -> Any:
        """The module."""
        ...


class Linear(Module):
    """x w + b: the output layer of a head."""

    def __init__(self, inputs: int, *, rngs: Rngs) -> None:
        self.out = Dense(inputs, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b o"], call: Pass) -> Float[Array, " b"]:
        return self.out(x, call)[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flat:
    """Everything side by side, through `deep` where there is one: an MLP, or logistic regression without."""

    deep: Deep | None = None
    first_order = False

    def make(self, inputs: InputShape, *, rngs: Rngs) -> FlatLayers:
        """The module."""
        return FlatLayers(self, inputs, rngs=rngs)


class FlatLayers(Module):
    """See `Flat`."""

    def __init__(self, config: Flat, inputs: InputShape, *, rngs: Rngs) -> None:
        self.deep = config.deep.make(inputs.flat, rngs=rngs) if config.deep else None
        self.width = self.deep.width if self.deep else inputs.flat

    def __call__(self, inputs: Inputs, call: Pass) -> Crossed:
        return Crossed(self.deep(inputs.composed(), call) if self.deep else inputs.flat())

    def output(self, *, rngs: Rngs) -> Linear:
        """The output layer of a head."""
        return Linear(self.width, rngs=rngs)
