"""The Objective contract: how a loss finds its inputs and what it returns.

A model names its outputs, a batch names its fields, and an objective says by key which of them it reads:
`"out.hidden"`, `"batch.target_ids"`, `"const.item_count"`. Model and loss therefore never import each other and any
pairing is one line of configuration. An objective returns a sum and a weight, not a mean, so that micro-batches,
devices and hosts add up to the same loss whatever way the examples were cut.

`const` holds device-resident facts about the prepared data, the same in every step:
`item_count` float32 [v]: how often each catalogue row occurs in the training split (0 for padding and unknown).
`item_valid` bool [v]: which rows are items; `num_items` int32 []: how many. `item_trained` bool [v]: which of them
occur in the training split at all; the others may not exist yet when the training examples are made.
`drawn/<name>/...`: what the objective of that name has prepared from these.
`step` int32 []: how many updates there have been; the engine adds it.

An objective that draws items does so in `draw`, before anything is differentiated: the engine then knows every row of
the catalogue that a step touches, and can leave the others alone (`core.sparse_rows`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

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
    # Whether the loss reads the table beyond the ids in the batch and what `draw` adds to it.
    reads_catalogue: ClassVar[bool] = False

    def total_weight(self, batch: Tree) -> Float[Array, ""]:
        """What the loss is divided by: the weight of the whole batch, known before any of it is computed."""
        return find(self.weight, out={}, batch=batch, const={}).sum()

    def prepare(self, const: Tree) -> dict[str, jax.Array]:
        """Entries `drawn/<name>/...` for `const`, made once for a run."""
        return {}

    def draw(self, batch: Tree, const: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Entries `drawn/<name>/...` for the batch; one that ends in `rows` holds rows of the catalogue, int32."""
        return {}

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum and weight of the loss; `key`, the one `draw` was given, seeds whatever it draws."""
        raise NotImplementedError(type(self).__name__)


def find(path: str, *, out: Tree, batch: Tree, const: Tree) -> Any:
    """What is at `path`, whose first part is `out`, `batch` or `const`."""
    root, _, name = path.partition(".")
    sources = {"out": out, "batch": batch, "const": const}
    if root not in sources or name not in sources[root]:
        known = sorted(sources[root]) if root in sources else sorted(sources)
        raise KeyError(f"objective asks for {path!r}, which is not there; known: {known}")
    return sources[root][name]
