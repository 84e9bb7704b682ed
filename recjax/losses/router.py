"""Losses on the routers of a mixture of experts, and how evenly the experts are used.

Both read the sums over real slots that a model with experts puts among its outputs (`nn.moe.Routing`), so that padding
counts nowhere. T is the number of real slots and f_e how many of the T k choices fell on expert e, as a share of them;
P_e is the mean of the probability that a softmax over all experts gives e. Three definitions of load balance are in
use that are not equal; here all but "hf" are 1 where every expert is used alike:

    "layers"   mean over layers of E sum_e f_e P_e (Fedus et al. 2022, arXiv 2101.03961, equation 4), f and P over a
               whole micro-batch
    "rows"     the same with f and P over each row, mean over rows by their slots
    "hf"       f and P over all layers and slots together, and times k: what `transformers` computes

A balance is no sum over tokens: where a batch is cut into micro-batches, "layers" and "hf" are means over these by
their slots, each micro-batch being balanced by itself. "rows" does not depend on the cut at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.losses.objective import LossSum, Objective, Tree, find

_DEFINITIONS = ("layers", "rows", "hf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterObjective(Objective):
    """Base of both: what it is divided by are the real slots of the batch, by `weight` their segment numbers."""

    weight: str = "batch.segment_ids"

    def slots(self, batch: Tree) -> Float[Array, " b"]:
        """Real slots of each row."""
        return (find(self.weight, out={}, batch=batch, const={}) > 0).astype(jnp.float32).sum(1)

    def total_weight(self, batch: Tree) -> Float[Array, ""]:
        """The real slots of the batch."""
        return self.slots(batch).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterBalance(RouterObjective):
    """Load balance by one of the three definitions above.

    Its metrics are `layer<i>/largest_load` and `layer<i>/smallest_load`: how much the busiest and the idlest expert of
    a layer have to do, 1 being an even share.
    """

    name: str = "router_balance"
    scale: float = 0.01
    definition: Literal["layers", "rows", "hf"] = "layers"
    counts: str = "out.router/counts"
    chances: str = "out.router/chances"

    def __post_init__(self) -> None:
        if self.definition not in _DEFINITIONS:
            raise ConfigError(f"RouterBalance.definition = {self.definition!r}", expected=f"one of {_DEFINITIONS}")

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over real slots, and their number."""
        counts, chances = (find(path, out=out, batch=batch, const=const) for path in (self.counts, self.chances))
        slots = self.slots(batch)
        weight = slots.sum()
        if self.definition == "rows":
            total = (balance(counts, chances).mean(0) * slots).sum()
        elif self.definition == "layers":
            total = balance(counts.sum(1), chances.sum(1)).mean() * weight
        else:
            k = counts.sum() / jnp.maximum(chances.sum(), 1e-9)
            total = balance(counts.sum((0, 1)), chances.sum((0, 1))) * k * weight
        return LossSum(total, weight, self._loads(counts, weight))

    def _loads(self, counts: Float[Array, "n b e"], weight: Float[Array, ""]) -> dict[str, Any]:
        load = shares(counts.sum(1)) * counts.shape[-1]
        ends = {"largest_load": load.max(-1), "smallest_load": load.min(-1)}
        return {
            f"layer{i}/{name}": (value[i] * weight, weight) for i in range(len(load)) for name, value in ends.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterZ(RouterObjective):
    """Mean over layers and real slots of (log sum_e exp x_e)^2 of the router's scores x (Zoph et al. 2022).

    It keeps scores small enough for their softmax to be exact (ST-MoE, arXiv 2202.08906, equation 5).
    """

    name: str = "router_z"
    scale: float = 1e-3
    z: str = "out.router/z"

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over real slots, and their number."""
        z = find(self.z, out=out, batch=batch, const=const)
        return LossSum(z.sum(1).mean(), self.slots(batch).sum(), {})


def shares(sums: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
    """Sums over experts as shares of their total; zero where there is none."""
    return sums / jnp.maximum(sums.sum(-1, keepdims=True), 1e-9)


def balance(counts: Float[Array, "*n e"], chances: Float[Array, "*n e"]) -> Float[Array, "*n"]:
    """E sum_e f_e P_e; the gradient goes through P alone, as choices have none."""
    return counts.shape[-1] * (shares(counts) * shares(chances)).sum(-1)
