"""Softmax against sampled negatives, and what every sampled loss shares.

`SampledObjective` draws negatives and makes logits; subclasses turn them into a loss: `SampledSoftmax` here, the
binary losses in `recjax.losses.binary`. The full softmax is in `recjax.losses.softmax`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from recjax.core.rows import take_rows
from recjax.losses.negatives import Sampler, Share, catalogue_weights, draw_rows, log_chance
from recjax.losses.objective import LossSum, Objective, Tree, find

EXCLUDED = np.float32(-1e30)


class Scores(NamedTuple):
    """Logits of targets and negatives; `hit` marks negatives that are the target itself.

    `log_expected` is how often each negative is expected among the draws, as a logarithm.
    """

    target: Float[Array, "b l"]
    negative: Float[Array, "b l n"]
    hit: Bool[Array, "b l n"]
    log_expected: Float[Array, "#b #l n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledObjective(Objective):
    """A loss over the target and `num_negatives` drawn items.

    `sampler`: `uniform` over the catalogue, `popularity` (training count to the `power`) or `in_batch` (targets of
    the batch). `share`: one draw for the `batch` (of each micro-batch), for each `row` of it, or for each `position`.
    Logits are divided by `temperature`.
    """

    hidden: str = "out.hidden"
    table: str = "out.table"
    targets: str = "batch.target_ids"
    valid: str = "const.item_valid"
    count: str = "const.item_count"
    num_negatives: int = 128
    sampler: Sampler = "uniform"
    power: float = 1.0
    share: Share = "batch"
    temperature: float = 1.0

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum of `position_loss` with `weight`."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        weight, valid = get(self.weight).astype(jnp.float32), get(self.valid)
        loss = self.position_loss(self._scores(get, weight, valid, key), valid)
        total = weight.sum()
        return LossSum((loss * weight).sum(), total, {})

    def position_loss(self, scores: Scores, valid: Bool[Array, " v"]) -> Float[Array, "b l"]:
        """Loss of each position."""
        raise NotImplementedError(type(self).__name__)

    def _scores(self, get: Any, weight: jax.Array, valid: jax.Array, key: jax.Array) -> Scores:
        hidden, table, targets = get(self.hidden), get(self.table), get(self.targets)
        weights = catalogue_weights(self.sampler, self.power, valid, get(self.count))
        lead = {"batch": (1, 1), "row": (targets.shape[0], 1), "position": targets.shape}[self.share]
        shape = (*lead, self.num_negatives)
        if self.sampler == "in_batch":
            negatives = targets.reshape(-1)[draw_rows(key, shape, (weight > 0).reshape(-1).astype(jnp.float32))]
        else:
            negatives = draw_rows(key, shape, weights)
        target_rows, table = take_rows(table, targets)
        negative_rows, _ = take_rows(table, negatives, by_batch=self.share != "batch")
        hidden = hidden / self.temperature
        target = jnp.einsum("bld,bld->bl", hidden.astype(jnp.float32), target_rows)
        negative = _negative_logits(hidden, negative_rows.astype(hidden.dtype))
        hit = negatives == targets[..., None]
        return Scores(target, negative, hit, log_chance(weights, negatives) + np.log(self.num_negatives))


def _negative_logits(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """[b, l, n] from `rows` [1 or b, 1 or l, n, d]."""
    if rows.shape[:2] == (1, 1):
        return jnp.einsum("bld,nd->bln", hidden, rows[0, 0], preferred_element_type=jnp.float32)
    if rows.shape[1] == 1:
        return jnp.einsum("bld,bnd->bln", hidden, rows[:, 0], preferred_element_type=jnp.float32)
    return jnp.einsum("bld,blnd->bln", hidden, rows, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSoftmax(SampledObjective):
    """Cross-entropy of the target against the drawn negatives: -s_y + log(exp s_y + sum_j exp(s_j - log n q_j)).

    n draws of chance q_j each; a draw that is the target itself is left out. With `logq` the sum estimates the
    partition function of the full softmax without bias (Bengio and Senecal 2008; for `in_batch`, where q is the
    item's share of the training log, Yi et al. 2019). Without it, every negative counts once.
    """

    logq: bool = True

    def position_loss(self, scores: Scores, valid: Bool[Array, " v"]) -> Float[Array, "b l"]:
        """Loss of each position."""
        return sampled_softmax(scores, logq=self.logq)


def sampled_softmax(scores: Scores, *, logq: bool) -> Float[Array, "b l"]:
    """The loss of `SampledSoftmax` from logits."""
    negative = scores.negative - scores.log_expected if logq else scores.negative
    negative = jnp.where(scores.hit, EXCLUDED, negative)
    return jnp.logaddexp(scores.target, jax.nn.logsumexp(negative, axis=-1)) - scores.target
