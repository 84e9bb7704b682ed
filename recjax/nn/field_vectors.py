"""The fields of a row as vectors of one width: looked up in one table, pooled, or projected.

Fields of ids share the table (`data.fields`: a field owns a range of its rows), so that a row is one lookup, however
many fields it has, and the table is sharded and trained as that of items is. The table itself belongs to the model.
"""

from __future__ import annotations

import dataclasses
import functools
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
from recjax.nn.past_vectors import PRESENT, PastVectors
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

    A number stands beside the vectors ("number"), or is a vector of its own times its value ("vector"). `past` makes
    one vector of several that earlier models had (`nn.past_vectors`), in the place of these. Fields that are `unread`
    have no vector of their own: their values are only looked up in tables of earlier models. `dropout` acts on the
    vectors of fields.
    """

    width: int = 16
    pooling: Literal["mean", "sum"] = "mean"
    attention: TargetAttention | None = None
    numeric: Literal["number", "vector"] = "number"
    past: Sequence[PastVectors] = ()
    unread: Sequence[str] = ()
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
        ids = tuple(f.name for f in fields if f.kind == "categorical")
        if unknown := sorted(set(config.unread) - set(ids)):
            raise ConfigError(f"no field {', '.join(unknown)}", where="FieldConfig.unread", expected=", ".join(ids))
        self.single = tuple(name for name in ids if name not in config.unread)
        self.several = tuple((f.name, f.of) for f in fields if f.kind in ("multi_valued", "sequence"))
        taken = [name for one in config.past for name in one.fields]
        self.projected = tuple(f.name for f in fields if f.kind == "vector" and f.name not in taken)
        self.numeric = tuple(f.name for f in fields if f.kind == "numeric")
        by_vector, past = self.numeric if config.numeric == "vector" else (), (p.name for p in config.past)
        self.shape = InputShape(
            names=(*self.single, *(name for name, _ in self.several), *self.projected, *past, *by_vector),
            width=config.width,
            numbers=len(self.numeric) - len(by_vector),
        )
        if not self.shape.flat:
            raise ConfigError("a ranker without fields", mend="declare fields for the task of the recipe")
        widths = {f.name: f.width for f in fields if f.kind == "vector"}
        for number, name in enumerate(self.projected):
            setattr(self, f"project{number}", Dense(widths[name], config.width, rngs=rngs))
        for number, one in enumerate(config.past):
            found = {one.width} if one.of in ids else {widths.get(name, 0) for name in one.fields}
            known = one.of in ids or {f"{name}{PRESENT}" for name in one.fields} <= {*self.numeric}
            if found == {0} or len(found) != 1 or not known:
                raise ConfigError(
                    f"the past {one.name!r} cannot be made of {', '.join(one.fields)}",
                    expected="vector fields of one width, with their presence, or tables for a field of ids",
                )
            setattr(self, f"past{number}", one.make(found.pop(), config.width, rngs=rngs))
        normal = nnx.initializers.normal(1e-2)
        columns = config.width + first_order
        self.scaled = param(rngs, (len(by_vector), columns), (None, None), normal) if by_vector else None
        for number, field in enumerate(f for f in fields if f.kind in ("multi_valued", "sequence")):
            if field.kind == "sequence" and config.attention is not None and field.of:
                if field.of not in self.single:
                    expected = ", ".join(self.single)
                    raise ConfigError(f"no field {field.of!r} for {field.name!r} to attend to", expected=expected)
                setattr(self, f"attention{number}", config.attention.make(config.width, rngs=rngs))

    def __call__(self, batch: Mapping[str, Any], table: Float[Array, "v e"], call: Pass) -> Inputs:
        """Reads `field/<name>` of every field."""
        width, block, parts = self.config.width, *self._look_up(batch, table)
        vectors = [block[..., :width]] if self.single else []
        weights = [block[..., width:].sum((1, 2))]
        for number, ((_, of), (values, real)) in enumerate(zip(self.several, parts, strict=True)):
            pooled = self._pool(values, real)
            weights.append(pooled[:, width:].sum(1))
            pooled = pooled[:, :width]
            if hasattr(self, f"attention{number}"):
                attention, target = getattr(self, f"attention{number}"), block[:, self.single.index(of), :width]
                pooled = attention(target, values[..., :width], real, call.part(number))
            vectors.append(pooled[:, None])
        for number, name in enumerate(self.projected):
            vectors.append(getattr(self, f"project{number}")(batch[f"field/{name}"], call)[:, None])
        vectors += [getattr(self, f"past{number}").of_batch(batch)[:, None] for number in range(len(self.config.past))]
        rows = weights[0].shape[0]
        numbers = [batch[f"field/{name}"] for name in self.numeric]
        values = jnp.stack(numbers, axis=1) if numbers else jnp.zeros((rows, 0), table.dtype)
        if self.scaled is not None:
            scaled = values[..., None] * self.scaled[...][None]
            vectors.append(scaled[..., :width])
            weights.append(scaled[..., width:].sum((1, 2)))
            values = values[:, :0]
        stacked = jnp.concatenate(vectors, axis=1) if vectors else jnp.zeros((rows, 0, width), table.dtype)
        first = functools.reduce(jnp.add, weights) if self.first_order else None
        return Inputs(call.dropout(stacked, self.config.dropout), values, first)

    def _look_up(
        self, batch: Mapping[str, Any], table: jax.Array
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """In one lookup: vectors [b, s, e] of all fields of one value, which nobody need take apart, and of every field
        of several values their vectors [b, n, e], zero where padded, and which are there [b, n]."""
        several = [batch[f"field/{name}"] for name, _ in self.several]
        ids = [*(batch[f"field/{name}"][:, None] for name in self.single), *several]
        if not ids:
            rows = next(x.shape[0] for name, x in batch.items() if name.startswith("field/"))
            return jnp.zeros((rows, 0, table.shape[1]), table.dtype), []
        ends = [len(self.single)]
        for each in several[:-1]:
            ends.append(ends[-1] + each.shape[1])
        block, *parts = jnp.split(lookup(table, jnp.concatenate(ids, axis=1)), ends if several else [], axis=1)
        return block, [(part, each != PAD) for part, each in zip(parts, several, strict=True)]

    def _pool(self, found: Float[Array, "b n e"], real: Bool[Array, "b n"]) -> Float[Array, "b e"]:
        total = found.sum(1)
        return total if self.config.pooling == "sum" else total / jnp.maximum(real.sum(1), 1)[:, None]
