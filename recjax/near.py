"""A catalogue whose items are searched approximately: what `recjax.retrieve.Rows` finds, nearly, in less than its time.

The index is on the host, so that a compiled program calls out to it. That serves evaluation and `infer`; an exported
function cannot hold it: whoever serves a large catalogue searches the index with the vectors of an exported encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.module import Functional, Params
from recjax.index.approximate import ApproximateIndex
from recjax.retrieve import Answers, encode


@dataclasses.dataclass(frozen=True)
class Near:
    """The items of an index over the table that the model's queries are scored against, as it is at one step.

    The index must have been made of that table: `encode` gives it beside the queries.
    """

    index: ApproximateIndex

    @property
    def most(self) -> int:
        """How many answers there always are, where as many items are left."""
        return self.index.num_items

    def __call__(
        self,
        model: Functional,
        params: Params,
        batch: Mapping[str, Any],
        k: int,
        *,
        exclude: jax.Array,
        allowed: jax.Array | None = None,
    ) -> Answers:
        """As every `recjax.retrieve.Catalogue` answers; a few of the best may be missing."""
        query, _ = encode(model, params, batch)
        filters = () if allowed is None else (allowed,)

        def search(query: Any, exclude: Any, *filters: Any) -> tuple[np.ndarray, np.ndarray]:
            allowed = np.asarray(filters[0]) if filters else None
            return self.index.top_k(np.asarray(query), k, exclude_ids=np.asarray(exclude), allowed=allowed)

        shape = (query.shape[0], k)
        found = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32))
        return Answers(*jax.pure_callback(search, found, query, exclude, *filters))
