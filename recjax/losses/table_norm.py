"""The squared norm of a ranker's table as a loss: L2 regularisation that the optimiser sees, as click models have it.

With Adam this is not weight decay: the gradient of a row that no example touches is its own value, scaled like any
other, so that rare values are driven to zero within some thousand steps. Published results of FuxiCTR and BARS on
small sets hang on it (`embedding_regularizer`). Every row moves in every step.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from recjax.losses.objective import LossSum, Objective, Tree, find


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableNorm(Objective):
    """`scale` times the sum of squares of the table, halved, which the model tells as `norm` (`Ranker.norm`)."""

    name: str = "table_norm"
    norm: str = "out.norm/table"
    reads_catalogue: ClassVar[bool] = True

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """As much for each row of the batch, so that its mean is the norm however the batch is cut."""
        weight = find(self.weight, out=out, batch=batch, const=const).sum()
        return LossSum(find(self.norm, out=out, batch=batch, const=const) * weight, weight, {})
