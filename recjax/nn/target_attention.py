"""What a history is worth to a candidate: the local activation unit of DIN (Zhou et al. 2018, arXiv 1706.06978)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.core.module import Module, Rngs
from recjax.nn.composed import Compared, taken
from recjax.nn.dense import Dense, Pass
from recjax.nn.tower import TowerConfig

_NEGATIVE = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetAttention:
    """sum_j a(t, s_j) s_j, a being a `unit` over [t, s, t - s, t * s] with one output.

    Weights are as they come, so that the strength of an interest is kept (section 4.3); `softmax` brings their sum
    to one. A history of nothing gives zero.
    """

    unit: TowerConfig = TowerConfig(widths=(80, 40), activation="dice")
    softmax: bool = False

    def make(self, width: int, *, rngs: Rngs) -> TargetAttentionLayers:
        """The module, for vectors of `width`."""
        return TargetAttentionLayers(self, width, rngs=rngs)


class TargetAttentionLayers(Module):
    """See `TargetAttention`."""

    def __init__(self, config: TargetAttention, width: int, *, rngs: Rngs) -> None:
        self.softmax = config.softmax
        self.unit = config.unit.make(4 * width, rngs=rngs)
        self.out = Dense(self.unit.width, 1, rngs=rngs)

    def __call__(
        self,
        target: Float[Array, "b d"],
        history: Float[Array, "r n d"],
        real: Bool[Array, "r n"],
        call: Pass,
        *,
        owner: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b d"]:
        """Histories are those of rows, or of contexts where rows have an `owner`."""
        x, real = Compared(target, history, owner), taken(real, owner)
        weights = self.out(self.unit(x, call), call)[..., 0]
        if self.softmax:
            weights = jax.nn.softmax(jnp.where(real, weights, _NEGATIVE), axis=1)
        return jnp.einsum("bn,bnd->bd", jnp.where(real, weights, 0), x.of_rows())
