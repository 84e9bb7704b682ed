"""The loss of a residual quantiser: a decoder that rebuilds content, and books and encoder that approach each other."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from recjax.losses.objective import LossSum, Objective, Tree, find


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualQuantization(Objective):
    """|x - x'|^2 + sum_l (codebook |sg(r_l) - e_l|^2 + commitment |r_l - sg(e_l)|^2), a mean over items.

    r_l is what the levels before l left over and e_l the row that level l chose (van den Oord et al. 2017 at every
    level, as in Lee et al. 2022). What a level takes away is a constant to those after it, so that every level
    commits the encoder: its gradient is 2 commitment sum_l (z - sum_{j<=l} e_j). (Where published code lets the
    straight-through estimate into the residuals, only the first level does.) Squares are summed over dimensions.
    """

    name: str = "codes"
    content: str = "out.content"
    reconstruction: str = "out.reconstruction"
    residuals: str = "out.residuals"
    chosen: str = "out.chosen"
    codebook: float = 1.0
    commitment: float = 0.25

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: Key[Array, ""]) -> LossSum:
        """Sum over the items of the batch, with its three parts as metrics."""
        x, made, left, chosen = (
            find(path, out=out, batch=batch, const=const)
            for path in (self.content, self.reconstruction, self.residuals, self.chosen)
        )
        weight = find(self.weight, out=out, batch=batch, const=const)
        parts = {
            "reconstruction": ((x - made) ** 2).sum(-1),
            "codebook": _squares(jax.lax.stop_gradient(left) - chosen),
            "commitment": _squares(left - jax.lax.stop_gradient(chosen)),
        }
        sums = {name: (weight * value).sum() for name, value in parts.items()}
        total = sums["reconstruction"] + self.codebook * sums["codebook"] + self.commitment * sums["commitment"]
        return LossSum(total, weight.sum(), {name: (value, weight.sum()) for name, value in sums.items()})


def _squares(x: Float[Array, "b c d"]) -> Float[Array, "b"]:
    return jnp.sum(x * x, axis=(1, 2))
