"""The Objective contract: how a loss finds its inputs and what it returns.

A model names its outputs, a batch names its fields, and an objective says by key which of them it reads:
`"out.hidden"`, `"batch.target_ids"`, `"const.item_count"`. Model and loss therefore never import each other and any
pairing is one line of configuration. An objective returns a sum and a weight, not a mean, so that micro-batches,
devices and hosts add up to the same loss whatever way the examples were cut.

`const` holds device-resident facts about the prepared data, the same in every step:
`item_count` float32 [v]: how often each catalogue row occurs in the training split (0 for padding and unknown).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

Tree = Mapping[str, Any]


class LossSum(NamedTuple):
    """`total / weight` is the loss; `metrics` maps a name to its own (sum, weight)."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives; subclasses add key fields and implement `__call__`."""

    name: str = "next_item"
    scale: float = 1.0
    weight: str = "batch.weight"

    def total_weight(self, batch: Tree) -> Float[Array, ""]:
        """What the loss is divided by: the weight of the whole batch, known before any of it is computed."""
        return find(self.weight, out={}, batch=batch, const={}).sum()

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum and weight of the loss; `key` seeds whatever the objective draws."""
        raise NotImplementedError(type(self).__name__)


def find(path: str, *, out: Tree, batch: Tree, const: Tree) -> jax.Array:
    """The array at `path`, whose first part is `out`, `batch` or `const`."""
    root, _, name = path.partition(".")
    sources = {"out": out, "batch": batch, "const": const}
    if root not in sources or name not in sources[root]:
        known = sorted(sources[root]) if root in sources else sorted(sources)
        raise KeyError(f"objective asks for {path!r}, which is not there; known: {known}")
    return sources[root][name]
