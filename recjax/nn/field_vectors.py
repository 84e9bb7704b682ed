"""The fields of a row as vectors of one width: looked up in one table, pooled, or projected.

Fields of ids share the table (`data.fields`: a field owns a range of its rows), so that a row is one lookup, however
many fields it has, and the table is sharded and trained as that of items is. The table itself belongs to the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.composed import taken
from recjax.nn.dense import Dense, Pass
from recjax.nn.embed import PAD, lookup
from recjax.nn.intent_gate import IntentGate
from recjax.nn.interaction import Alike, Inputs, InputShape
from recjax.nn.item_vectors import ContentVectors, PieceVectors
from recjax.nn.past_vectors import PRESENT, PastVectors
from recjax.nn.target_attention import TargetAttention
from recjax.nn.target_encoder import TargetEncoder

ROW_KINDS, ITEM = ("categorical", "multi_valued", "sequence"), "item"
CONTEXT, OWNER = "context/", "owner"


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
    field whose rows it shares, where there is one, and else as several values are. `beside` names for a list another
    one of the same length, whose vectors are added to its own place by place before it is pooled: what was done with
    the items of a history. That one is not pooled by itself.

    Fields of kind "item", and sequences of them, have the vectors that `items` makes of facts (`nn.item_vectors`).

    A number stands beside the vectors ("number"), or is a vector of its own times its value ("vector"). `past` makes
    one vector of several that earlier models had (`nn.past_vectors`), in the place of these. Fields that are `unread`
    have no vector of their own: their values are only looked up in tables of earlier models. `gate` scales the vectors
    of some fields by another one. `dropout` acts on the vectors of fields.
    """

    width: int = 16
    pooling: Literal["mean", "sum"] = "mean"
    attention: TargetAttention | TargetEncoder | None = None
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numeric: Literal["number", "vector"] = "number"
    items: PieceVectors | ContentVectors | None = None
    past: Sequence[PastVectors] = ()
    unread: Sequence[str] = ()
    gate: IntentGate | None = None
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
        if unknown := [f.name for f in fields if f.kind not in (*ROW_KINDS, ITEM, "numeric", "vector")]:
            raise ConfigError(f"fields of an unknown kind: {', '.join(unknown)}")
        self.config, self.first_order = config, first_order
        ids = tuple(f.name for f in fields if f.kind == "categorical")
        if unknown := sorted(set(config.unread) - set(ids)):
            raise ConfigError(f"no field {', '.join(unknown)}", where="FieldConfig.unread", expected=", ".join(ids))
        self.single = tuple(name for name in ids if name not in config.unread)
        items = [f.name for f in fields if f.kind == ITEM]
        self.of_items = tuple(f.name for f in fields if f.name in items or f.of in items)
        lists = [f for f in fields if f.kind in ("multi_valued", "sequence") and f.name not in self.of_items]
        self.beside = _beside(config.beside, {f.name: f.width for f in lists})
        lists = [f for f in lists if f.name not in self.beside.values()]
        self.several = tuple((f.name, f.of) for f in lists)
        taken = [name for one in config.past for name in one.fields]
        self.projected = tuple(f.name for f in fields if f.kind == "vector" and f.name not in taken)
        self.numeric = tuple(f.name for f in fields if f.kind == "numeric")
        by_vector, past = self.numeric if config.numeric == "vector" else (), (p.name for p in config.past)
        self.shape = InputShape(
            names=(
                *(*self.single, *(name for name, _ in self.several), *self.projected),
                *(*past, *self.of_items, *by_vector),
            ),
            width=config.width,
            numbers=len(self.numeric) - len(by_vector),
        )
        self.numbers = () if by_vector else self.numeric
        if not self.shape.flat:
            raise ConfigError("a ranker without fields", mend="declare fields for the task of the recipe")
        self.gate = config.gate.make(self.shape, rngs=rngs) if config.gate else None
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
        if bool(items) != (config.items is not None):
            expected = "both a field of kind item (fields.CatalogueItem) and how items have vectors, or neither"
            raise ConfigError(f"FieldConfig.items = {config.items} for the fields {items}", expected=expected)
        self.items = config.items.make(columns, rngs=rngs) if config.items else None
        self.scaled = param(rngs, (len(by_vector), columns), (None, None), normal) if by_vector else None
        for number, field in enumerate(lists):
            if field.kind == "sequence" and config.attention is not None and field.of:
                if field.of not in self.single:
                    expected = ", ".join(self.single)
                    raise ConfigError(f"no field {field.of!r} for {field.name!r} to attend to", expected=expected)
                setattr(self, f"attention{number}", config.attention.make(config.width, rngs=rngs))

    def __call__(self, batch: Mapping[str, Any], table: Float[Array, "v e"], call: Pass) -> Inputs:
        """Reads `field/<name>` of every field.

        Fields of which there is `context/<name>` [r, ...] instead are those of contexts, row k being of the context
        `owner[k]`; they are looked up, pooled and projected once for each context.
        """
        width, owner = self.config.width, batch.get(OWNER)
        shared = {f"field/{name.removeprefix(CONTEXT)}": x for name, x in batch.items() if name.startswith(CONTEXT)}
        of_rows = {**batch, **{name: taken(x, owner) for name, x in shared.items()}}
        alike: set[str] = set()

        def made(name: str, reads: Sequence[str], make: Callable[[Mapping[str, Any]], jax.Array]) -> jax.Array:
            """What `make` makes of a batch, for every row; of the contexts where they have all that it reads."""
            if not {f"field/{one}" for one in reads} <= shared.keys():
                return make(of_rows)
            alike.add(name)
            return taken(make({**batch, **shared}), owner)

        rows = next(x for name, x in of_rows.items() if name.startswith("field/")).shape[0]
        block, parts = self._look_up(batch, table, rows)
        found = {name: (*part, None) for name, part in parts.items()}
        if shared:
            known, parts = self._look_up(shared, table, _count(shared))
            found |= {name: (*part, owner) for name, part in parts.items()}
            alike |= {name for name in self.single if f"field/{name}" in shared}
            order = [*(n for n in self.single if n not in alike), *(n for n in self.single if n in alike)]
            block = jnp.concatenate([block, taken(known, owner)], axis=1)
            block = block[:, jnp.asarray([order.index(name) for name in self.single], jnp.int32)]
        vectors = [block[..., :width]] if self.single else []
        weights = [block[..., width:].sum((1, 2))]
        for number, (name, of) in enumerate(self.several):
            values, real, whose = self._with_beside(name, found)
            pooled = taken(self._pool(values, real), whose)
            weights.append(pooled[:, width:].sum(1))
            pooled = pooled[:, :width]
            if hasattr(self, f"attention{number}"):
                attention, target = getattr(self, f"attention{number}"), block[:, self.single.index(of), :width]
                pooled = attention(target, values[..., :width], real, call.part(number), owner=whose)
            elif whose is not None:
                alike.add(name)
            vectors.append(pooled[:, None])
        for number, name in enumerate(self.projected):
            project = getattr(self, f"project{number}")
            vectors.append(made(name, [name], lambda b, p=project, n=name: p(b[f"field/{n}"], call))[:, None])
        for number, one in enumerate(self.config.past):
            make = getattr(self, f"past{number}").of_batch
            reads = [one.of] if one.of else [n + bit for n in one.fields for bit in ("", PRESENT)]
            vectors.append(made(one.name, reads, make)[:, None])
        items = self.items(of_rows, call) if self.items is not None else table
        for name in self.of_items:
            vector = made(name, [name], lambda b, n=name: self._of_items(items, b[f"field/{n}"]))
            weights.append(vector[:, width:].sum(1))
            vectors.append(vector[:, None, :width])
        numbers = [made(name, [name], lambda b, n=name: jnp.asarray(b[f"field/{n}"])) for name in self.numeric]
        values = jnp.stack(numbers, axis=1) if numbers else jnp.zeros((rows, 0), table.dtype)
        if self.scaled is not None:
            scaled = values[..., None] * self.scaled[...][None]
            vectors.append(scaled[..., :width])
            weights.append(scaled[..., width:].sum((1, 2)))
            values = values[:, :0]
        stacked = jnp.concatenate(vectors, axis=1) if vectors else jnp.zeros((rows, 0, width), table.dtype)
        if self.gate is not None:
            stacked = self.gate(stacked)
            if self.shape.names[self.gate.by] not in alike:  # differs from row to row, and so does what it scales
                alike -= {self.shape.names[place] for place in self.gate.of}
        first = functools.reduce(jnp.add, weights) if self.first_order else None
        return Inputs(
            call.dropout(stacked, self.config.dropout), values, first, self._alike(alike, shared, owner, call)
        )

    def _alike(self, names: set[str], shared: Mapping[str, Any], owner: jax.Array | None, call: Pass) -> Alike | None:
        """What of the inputs contexts share; with dropout no two rows are alike."""
        if owner is None or not shared or call.train:
            return None
        vectors, numbers = ([k for k, n in enumerate(all_) if n in names] for all_ in (self.shape.names, self.numbers))
        return Alike(owner, _count(shared), tuple(vectors), tuple(numbers))

    def _look_up(
        self, batch: Mapping[str, Any], table: jax.Array, rows: Any
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """In one lookup: vectors [b, s, e] of the fields of one value, which nobody need take apart, and of each field
        of several values its vectors [b, n, e], zero where padded, and which are there [b, n]; of the fields that are
        in the batch."""
        single, several = (
            [name for name in names if f"field/{name}" in batch]
            for names in (self.single, [*(n for n, _ in self.several), *self.beside.values()])
        )
        lists = [jnp.asarray(batch[f"field/{name}"]) for name in several]
        ids = [*(batch[f"field/{name}"][:, None] for name in single), *lists]
        if not ids:
            return jnp.zeros((rows, 0, table.shape[1]), table.dtype), {}
        ends = [len(single)]
        for each in lists[:-1]:
            ends.append(ends[-1] + each.shape[1])
        block, *parts = jnp.split(lookup(table, jnp.concatenate(ids, axis=1)), ends if lists else [], axis=1)
        return block, {name: (part, each != PAD) for name, part, each in zip(several, parts, lists, strict=True)}

    def _with_beside(self, name: str, found: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Vectors of a list, which of them are there, and whose they are; with those beside it."""
        values, real, whose = found[name]
        if name not in self.beside:
            return values, real, whose
        more, known, theirs = found[self.beside[name]]
        if (whose is None) != (theirs is None):  # one is of rows, the other of their contexts
            values, real, more, known = (
                taken(values, whose),
                taken(real, whose),
                taken(more, theirs),
                taken(known, theirs),
            )
            whose = None
        return values + jnp.where((real & known)[..., None], more, 0), real, whose

    def _of_items(self, items: Float[Array, "v e"], rows: Int[Array, "b ..."]) -> Float[Array, "b e"]:
        """The vector of an item, or of several, of which 0 is none."""
        found = lookup(items, rows)
        return found if rows.ndim == 1 else self._pool(found, rows != PAD)

    def _pool(self, found: Float[Array, "b n e"], real: Bool[Array, "b n"]) -> Float[Array, "b e"]:
        total = found.sum(1)
        return total if self.config.pooling == "sum" else total / jnp.maximum(real.sum(1), 1)[:, None]


def _beside(told: Mapping[str, str], widths: Mapping[str, int]) -> dict[str, str]:
    """Which list stands beside which; `ConfigError` where one of the two is no list, or they differ in length."""
    for name, other in told.items():
        if name not in widths or widths[name] != widths.get(other) or other in told:
            raise ConfigError(
                f"the field {other!r} cannot stand beside {name!r}",
                where="FieldConfig.beside",
                expected="two lists of one length out of "
                + (", ".join(f"{n} ({w})" for n, w in widths.items()) or "none"),
            )
    return dict(told)


def _count(of_contexts: Mapping[str, Any]) -> Any:
    """How many contexts there are: a number, or a symbol for one."""
    return next(iter(of_contexts.values())).shape[0]
