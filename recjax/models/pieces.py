"""A sequence model whose item vectors are sums of rows of one table of pieces.

Which rows make an item is a fact of the recipe (`item/pieces`, see `recjax.data.pieces`). The table is as large as one
likes, whatever the catalogue, and an item that was never trained on has a vector out of the pieces that it shares
with others: no item is known by its row. In the end there is one table of items, and `models.folded.fold` makes the
plain model that has it.
"""

from typing import Any

import jax
from flax import nnx

from recjax.core.errors import ConfigError
from recjax.core.module import Rngs, param
from recjax.core.rows import sum_rows
from recjax.models.folded import FoldedSequence
from recjax.nn.transformer import INIT_STD

_MULTIPLE = 128  # so that the table can be split over devices, as those of items are


class PieceSequence(FoldedSequence):
    """`Sequence` with the item vectors sum_p table[pieces[i, p]], and a tied head.

    `rows` is the number of rows that pieces may name; the table has as many, rounded up to a multiple of 128. An item
    without pieces, and what is no item, has the vector 0.
    """

    def __init__(self, *, num_rows: int, rows: int, rngs: Rngs, **plain: Any) -> None:
        super().__init__(num_rows=num_rows, rngs=rngs, **plain)
        if rows < 1:
            raise ConfigError(f"PieceSequence.rows = {rows}", expected="the rows of the table of pieces, at least 1")
        shape = (-(-rows // _MULTIPLE) * _MULTIPLE, self.config.width)
        self.table = param(rngs, shape, ("pieces", None), nnx.initializers.normal(INIT_STD))

    def item_table(self, batch: dict[str, Any]) -> jax.Array:
        """[v, d]: what `fold` makes of them for good."""
        return sum_rows(self.table[...], batch["item/pieces"])
