"""The fields of a row as vectors of one width: looked up in one table, pooled, or projected.

Fields of ids share the table (`data.fields`: a field owns a range of its rows), so that a row is one lookup, however
many fields it has, and the table is sharded and trained as that of items is. The table itself belongs to the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.dense import Dense, Pass
from recjax.nn.embed import PAD, lookup
from recjax.nn.interaction import Inputs, InputShape
from recjax.nn.target_attention import TargetAttention

ROW_KINDS = ("categorical", "multi_valued", "sequence")


@runtime_checkable
class FieldShape(Protocol):
    """What is known of a field: see `recjax.data.fields.FieldShape`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def of(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """Vectors of `width`. Several values of a field are their `pooling`; a sequence is pooled by `attention` to the
    field whose rows it shares, where there is one, and else as several values are.

    A number stands beside the vectors ("number"), or is a vector of its own times its value ("vector"). `dropout` acts
    on the vectors of fields.
    """

    width: int = 16
    pooling: Literal["mean", "sum"] = "mean"
    attention: TargetAttention | None = None
    numeric: Literal["number", "vector"] = "number"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        known = self.pooling in ("mean", "sum") and self.numeric in ("number", "vector")
        if self.width < 1 or not 0 <= self.dropout < 1 or not known:
            raise ConfigError(
                f"fields cannot become vectors so: {self}",
                expected='width at least 1, dropout in [0, 1), pooling "mean" or "sum", numeric "number" or "vector"',
            )


class FieldVectors(Module):
    """`Inputs` of an interaction out of a batch; `shape` says what they are like.

    With `first_order` the table has one more column than the vectors, the fields' own weights.
    """

    def __init__(self, config: FieldConfig, fields: Sequence[FieldShape], *, first_order: bool, rngs: Rngs) -> None:
        if unknown := [f.name for f in fields if f.kind not in (*ROW_KINDS, "numeric", "vector")]:
            raise ConfigError(f"fields of an unknown kind: {', '.join(unknown)}")
        self.config, self.first_order = config, first_order
        self.rows = tuple((f.name, f.kind, f.width, f.of) for f in fields if f.kind in ROW_KINDS)
        self.projected = tuple(f.name for f in fields if f.kind == "vector")
        self.numeric = tuple(f.name for f in fields if f.kind == "numeric")
        by_vector = self.numeric if config.numeric == "vector" else ()
        self.shape = InputShape(
            names=(*(name for name, *_ in self.rows), *self.projected, *by_vector),
            width=config.width,
            numbers=len(self.numeric) - len(by_vector),
        )
        if not self.shape.flat:
            raise ConfigError("a ranker without fields", mend="declare fields for the task of the recipe")
        for number, field in enumerate(f for f in fields if f.kind == "vector"):
            setattr(self, f"project{number}", Dense(field.width, config.width, rngs=rngs))
        normal = nnx.initializers.normal(1e-2)
        columns = config.width + first_order
        self.scaled = param(rngs, (len(by_vector), columns), (None, None), normal) if by_vector else None
        for number, (_, kind, _, of) in enumerate(self.rows):
            if kind == "sequence" and config.attention is not None and of:
                self.shape.places((of,))
                setattr(self, f"attention{number}", config.attention.make(config.width, rngs=rngs))

    def __call__(self, batch: Mapping[str, Any], table: Float[Array, "v e"], call: Pass) -> Inputs:
        """Reads `field/<name>` of every field."""
        vectors: dict[str, jax.Array] = {}
        first = jnp.zeros((), table.dtype)
        histories: list[tuple[int, str, str]] = []
        looked_up = self._look_up(batch, table)
        for number, (name, kind, _, of) in enumerate(self.rows):
            values, real = looked_up[name]
            pooled = values[:, 0] if kind == "categorical" else self._pool(values, real)
            vectors[name], first = self._split(pooled, first)
            if hasattr(self, f"attention{number}"):
                histories.append((number, name, of))
        for number, name, of in histories:  # now that their targets are there
            (values, real), attention = looked_up[name], getattr(self, f"attention{number}")
            vectors[name] = attention(vectors[of], values[..., : self.config.width], real, call.part(number))
        for number, name in enumerate(self.projected):
            vectors[name] = getattr(self, f"project{number}")(batch[f"field/{name}"], call)
        numbers = [batch[f"field/{name}"] for name in self.numeric]
        if self.scaled is not None:
            for name, scale in zip(self.numeric, self.scaled[...], strict=True):
                vectors[name], first = self._split(batch[f"field/{name}"][:, None] * scale[None], first)
            numbers = []
        rows = next(iter((*vectors.values(), *numbers))).shape[0]
        empty = jnp.zeros((rows, 0, self.config.width), table.dtype)
        stacked = jnp.stack([vectors[name] for name in self.shape.names], axis=1) if vectors else empty
        return Inputs(
            call.dropout(stacked, self.config.dropout),
            jnp.stack(numbers, axis=1) if numbers else empty[:, :, 0],
            jnp.broadcast_to(first, (rows,)) if self.first_order else None,
        )

    def _look_up(self, batch: Mapping[str, Any], table: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Rows [b, n, e] of every field that has some, zero where padded, and which are there [b, n]; one lookup."""
        if not self.rows:
            return {}
        each = [batch[f"field/{name}"] for name, *_ in self.rows]
        each = [ids[:, None] if ids.ndim == 1 else ids for ids in each]
        ends, end = [], 0
        for ids in each[:-1]:
            ends.append(end := end + ids.shape[1])
        found = jnp.split(lookup(table, jnp.concatenate(each, axis=1)), ends, axis=1)
        return {name: (x, ids != PAD) for (name, *_), x, ids in zip(self.rows, found, each, strict=True)}

    def _pool(self, found: Float[Array, "b n e"], real: Bool[Array, "b n"]) -> Float[Array, "b e"]:
        total = found.sum(1)
        return total if self.config.pooling == "sum" else total / jnp.maximum(real.sum(1), 1)[:, None]

    def _split(self, x: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The vector, and `first` with the weight behind it added."""
        return (x[:, :-1], first + x[:, -1]) if self.first_order else (x, first)
