"""Binary losses over sampled negatives: is this item the next one?"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.losses.negatives import Share
from recjax.losses.sampled import SampledObjective, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(SampledObjective):
    """-(log sigmoid(s_y) + sum_j log(1 - sigmoid(s_j))) / (1 + n), with one negative per position the loss of SASRec.

    Draws that are the target itself are left out (Kang and McAuley 2018, arXiv 1808.09781, equation 6, up to the
    factor). Items elsewhere in the user's history count unless
    `exclude_row`.
    """

    num_negatives: int = 1
    share: Share = "position"

    def position_loss(self, scores: Scores, num_items: Int[Array, ""]) -> Float[Array, "b l"]:
        """Loss of each position."""
        return binary_cross_entropy(scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GBCE(SampledObjective):
    """Generalised binary cross-entropy of gSASRec: -(b log sigmoid(s_y) + sum_j log(1 - sigmoid(s_j))) / (1 + n).

    b = a (t (1 - 1/a) + 1/a) with the sampling rate a = n / (items - 1): t = 0 is plain binary cross-entropy, t = 1
    takes back all of the overconfidence that negative sampling brings (Petrov and Macdonald 2023, arXiv 2308.07192,
    section 5). The paper draws for each position; `row` shares a draw within a user's row.
    """

    num_negatives: int = 256
    share: Share = "row"
    t: float = 0.75

    def position_loss(self, scores: Scores, num_items: Int[Array, ""]) -> Float[Array, "b l"]:
        """Loss of each position."""
        rate = self.num_negatives / (num_items - 1)
        return binary_cross_entropy(scores, rate * (self.t * (1 - 1 / rate) + 1 / rate))


def binary_cross_entropy(scores: Scores, power: Float[Array, ""] | float = 1.0) -> Float[Array, "b l"]:
    """Loss of each position; the target's probability counts to the `power`."""
    negative = jnp.where(scores.hit, 0, jax.nn.softplus(scores.negative)).sum(-1)
    return (power * jax.nn.softplus(-scores.target) + negative) / (1 + scores.negative.shape[-1])
