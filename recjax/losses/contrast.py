"""A contrastive loss of pairs: which item goes with this user, among those of the batch and some of the catalogue.

For tables that are trained before any ranker (Hsu et al. 2025, Taming the one-epoch phenomenon, arXiv 2508.18700). The
model gives unit vectors of both sides of every row, and a table in which those of drawn items are found. Items of the
batch are met as often as they are popular, uniform draws reach the tail; both stand in one softmax, each item corrected
by how often it is expected among all candidates.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.losses import negatives as draws
from recjax.losses.objective import LossSum, Objective, Tree, find
from recjax.losses.sampled import EXCLUDED


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSoftmax(Objective):
    """-s_y + log(exp s_y + sum_j exp(s_j - log n_j)) over the items j of other pairs of the batch and `num_negatives`
    uniform draws, s being inner products over the `temperature` and n_j how often j is expected among these.

    A pair is a row whose `label` is at least a half; others are no candidates either. An item that is the pair's own
    does not count as a candidate, and with `exclude_user` none that this user has in another pair of the batch. With
    `symmetric` the mean of this and the same for users among those of the batch, uncorrected. Items that may be drawn
    are those with a `count`. Without `logq` every candidate counts once.

    The batch is that of all devices: the vectors of its items travel, [b, d] and not the table.
    """

    name: str = "pairs"
    label: str = "batch.label/click"
    user: str = "out.user"
    item: str = "out.item"
    table: str = "out.table"
    users: str = "batch.field/user_id"
    targets: str = "batch.field/item_id"
    count: str = "const.item/count"
    num_negatives: int = 64
    in_batch: bool = True
    temperature: float = 0.1
    logq: bool = True
    exclude_user: bool = True
    symmetric: bool = False

    def pair_weight(self, batch: Tree) -> Float[Array, " b"]:
        """The weight of every row as a pair, 0 where it is none."""
        get = functools.partial(find, out={}, batch=batch, const={})
        return jnp.where(get(self.label) >= 0.5, get(self.weight), 0)

    def total_weight(self, batch: Tree) -> Float[Array, ""]:
        """The weight of all pairs."""
        return self.pair_weight(batch).sum()

    def draw(self, batch: Tree, const: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Rows of uniform draws [n], and how often each of them and each item of the batch is expected, as a logarithm.

        Expected are the draws n / v and, with q the share of an item in `count`, the other pairs of the batch times q.
        """
        get = functools.partial(find, out={}, batch=batch, const=const)
        count, targets = get(self.count), get(self.targets)
        valid = (count > 0).astype(jnp.float32)
        rows = draws.draw_rows(key, (self.num_negatives,), valid) if self.num_negatives else jnp.zeros(0, jnp.int32)
        others = jnp.maximum((self.pair_weight(batch) > 0).sum() - 1, 0) if self.in_batch else 0

        def expected(of: jax.Array) -> jax.Array:
            share = count[of] / jnp.maximum(count.sum(), 1)
            return jnp.log(jnp.maximum(self.num_negatives / jnp.maximum(valid.sum(), 1) + others * share, 1e-30))

        names = ("rows", "log_expected", "batch_expected")
        values = (rows, expected(rows), expected(targets))
        return {f"drawn/{self.name}/{name}": value for name, value in zip(names, values, strict=True)}

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over pairs; metric `top`: how often a pair's own item is before all candidates."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        if f"drawn/{self.name}/rows" not in batch:
            batch = {**batch, **self.draw(batch, const, key)}
        rows, expected, of_batch = (
            batch[f"drawn/{self.name}/{name}"] for name in ("rows", "log_expected", "batch_expected")
        )
        user, item, targets, who = get(self.user), get(self.item), get(self.targets), get(self.users)
        weight, scale = self.pair_weight(batch), 1 / self.temperature
        own = (user * item).sum(1) * scale
        same_item, same_user = targets[:, None] == targets[None], who[:, None] == who[None]
        no_pair, hit = (weight <= 0)[None], same_item | (same_user if self.exclude_user else False)
        drawn = user @ get(self.table).rows(rows).T * scale - (expected[None] if self.logq else 0)
        scores = [jnp.where(rows[None] == targets[:, None], EXCLUDED, drawn)]
        square = user @ item.T * scale
        if self.in_batch:
            met = square - (of_batch[None] if self.logq else 0)
            scores.append(jnp.where(hit | no_pair, EXCLUDED, met))
        candidates = jnp.concatenate(scores, axis=1)
        loss = jnp.logaddexp(own, jax.nn.logsumexp(candidates, axis=1)) - own
        top = (own > candidates.max(1)).astype(jnp.float32) if candidates.shape[1] else jnp.ones_like(own)
        if self.symmetric:
            others = jnp.where(same_user | same_item | no_pair, EXCLUDED, square.T)
            loss = 0.5 * (loss + jnp.logaddexp(own, jax.nn.logsumexp(others, axis=1)) - own)
        total = weight.sum()
        return LossSum((weight * loss).sum(), total, {"top": ((weight * top).sum(), total)})
