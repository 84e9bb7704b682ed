"""Vectors of the same thing from earlier models, such as those of the last months, as one vector.

E-CDCTR (Liu et al. 2024, arXiv 2408.16238) aggregates what frozen monthly snapshots say of a user or an item by
self-attention; the paper gives no details, and this form is ours. A snapshot that does not know the id has no weight,
and an id that none knows has a learned vector. What comes out depends on these inputs and the parameters here alone:
it can be computed once for every id and be served as a vector.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.embed import lookup

PRESENT, KNOWN = ".present", ".known"
_NEGATIVE = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class PastVectors:
    """One vector, the field `name`, from the vector fields `fields`; whether they are known their presence bits say.

    With `of`, a field of ids, they are not fields but facts (`data.field_tables`): the rows that its ids have in the
    tables `item/<name>` of `width` numbers, known where `item/<name>.known` is not zero.

    `ages` (from 0, each with a learned vector) tells how old each snapshot is; none told, they are in order of age.
    """

    name: str
    fields: tuple[str, ...]
    ages: tuple[int, ...] = ()
    of: str = ""
    width: int = 0

    def __post_init__(self) -> None:
        ages = self.ages or tuple(range(len(self.fields)))
        is_whole = bool(self.of) == (self.width > 0)
        if not self.name or not self.fields or len(ages) != len(self.fields) or min(ages) < 0 or not is_whole:
            raise ConfigError(
                f"PastVectors {self.name!r} of the fields {self.fields} with ages {self.ages}",
                expected="a name, at least one field, an age of 0 or more for each, or none, and a width with `of`",
            )
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "ages", tuple(ages))

    def make(self, inner: int, width: int, *, rngs: Rngs) -> PastLayers:
        """The module that makes vectors of `inner` numbers one of `width`."""
        return PastLayers(self, inner, width, rngs=rngs)


class PastLayers(Module):
    """The mean over the known snapshots of softmax(Q K^T / sqrt(width)) V, Q, K and V being products of H + age."""

    def __init__(self, config: PastVectors, inner: int, width: int, *, rngs: Rngs) -> None:
        glorot, normal = nnx.initializers.glorot_normal(), nnx.initializers.normal(1e-2)
        self.config = config
        self.age = param(rngs, (max(config.ages) + 1, inner), (None, None), normal)
        self.query = param(rngs, (inner, width), (None, None), glorot)
        self.key = param(rngs, (inner, width), (None, None), glorot)
        self.value = param(rngs, (inner, width), (None, None), glorot)
        self.default = param(rngs, (width,), (None,), normal)

    def of_batch(self, batch: Mapping[str, Any]) -> Float[Array, "b o"]:
        """Reads `field/<name>` and `field/<name>.present` of every snapshot, or the rows of the tables."""
        if of := self.config.of:
            ids, names = batch[f"field/{of}"], self.config.fields
            tables = [(batch[f"item/{name}"], batch[f"item/{name}{KNOWN}"][:, None]) for name in names]
            found = [[lookup(part, ids) for part in both] for both in tables]
            return self(jnp.stack([v for v, _ in found], axis=1), jnp.concatenate([k for _, k in found], axis=1) > 0)
        past = jnp.stack([batch[f"field/{name}"] for name in self.config.fields], axis=1)
        return self(past, jnp.stack([batch[f"field/{name}{PRESENT}"] > 0 for name in self.config.fields], axis=1))

    def __call__(self, past: Float[Array, "b p i"], known: Bool[Array, "b p"]) -> Float[Array, "b o"]:
        """For p snapshots in the order of `fields`."""
        x = past + self.age[...][jnp.asarray(self.config.ages)][None]
        q, k, v = (x @ weight[...] for weight in (self.query, self.key, self.value))
        scores = jnp.einsum("bpo,bqo->bpq", q, k) / math.sqrt(q.shape[2])
        weights = jax.nn.softmax(jnp.where(known[:, None], scores, _NEGATIVE), axis=2)
        seen = jnp.einsum("bpq,bqo->bpo", jnp.where(known[:, None], weights, 0), jnp.where(known[..., None], v, 0))
        count = known.sum(1)[:, None]
        mean = jnp.where(known[..., None], seen, 0).sum(1) / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, self.default[...][None])
