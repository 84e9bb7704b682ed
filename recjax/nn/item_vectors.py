"""The vectors of items in a ranker, made of what is known of items besides their rows.

An item that no training row has cannot have learned a row of a table. What is known of it are facts over the catalogue:
the pieces of its semantic id (`data.pieces`), or a vector of its content (`data.features`). Either gives one vector for
every row of the catalogue; fields of kind "item" and sequences of them are looked up there
(`nn.field_vectors.FieldVectors`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.core.rows import sum_rows
from recjax.nn.dense import Dense, Pass

_MULTIPLE = 128  # so that a table can be split over devices, as those of items are


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceVectors:
    """Sums of rows of a table of their own, by the fact `item/pieces` (Singh et al. 2024, arXiv 2306.08121).

    `rows` is how many rows pieces may name, `scale` the standard deviation that they start with.
    """

    rows: int
    scale: float = 1e-2

    def __post_init__(self) -> None:
        if self.rows < 1 or self.scale <= 0:
            raise ConfigError(f"{self}", expected="the rows of the table of pieces, at least 1, and a scale above 0")

    def make(self, columns: int, *, rngs: Rngs) -> PieceTable:
        """The module that makes vectors of `columns` numbers."""
        return PieceTable(self, columns, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContentVectors:
    """The fact `item/vectors`, of `width` numbers, by a dense layer for each of `hidden` with a ReLU, and one more."""

    width: int
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.width < 1 or min(self.hidden, default=1) < 1:
            raise ConfigError(f"{self}", expected="widths of at least 1")

    def make(self, columns: int, *, rngs: Rngs) -> ContentLayers:
        """The module that makes vectors of `columns` numbers."""
        return ContentLayers(self, columns, rngs=rngs)


class PieceTable(Module):
    """See `PieceVectors`. An item without pieces, and what is no item, has the vector 0."""

    def __init__(self, config: PieceVectors, columns: int, *, rngs: Rngs) -> None:
        shape = (-(-config.rows // _MULTIPLE) * _MULTIPLE, columns)
        self.table = param(rngs, shape, ("pieces", None), nnx.initializers.normal(config.scale))

    def __call__(self, facts: Mapping[str, Any], call: Pass) -> Float[Array, "v e"]:
        """A vector for every row of the catalogue."""
        return sum_rows(self.table[...], facts["item/pieces"])


class ContentLayers(Module):
    """See `ContentVectors`."""

    def __init__(self, config: ContentVectors, columns: int, *, rngs: Rngs) -> None:
        widths = (config.width, *config.hidden, columns)
        self.count = len(widths) - 1
        for number in range(self.count):
            setattr(self, f"layer{number}", Dense(widths[number], widths[number + 1], rngs=rngs))

    def __call__(self, facts: Mapping[str, Any], call: Pass) -> Float[Array, "v e"]:
        """A vector for every row of the catalogue."""
        x = facts["item/vectors"]
        for number in range(self.count):
            x = getattr(self, f"layer{number}")(jax.nn.relu(x) if number else x, call)
        return x
