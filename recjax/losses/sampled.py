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
from jaxtyping import Array, Bool, Float, Int

from recjax.core.rows import take_rows
from recjax.losses import negatives as draws
from recjax.losses.negatives import Cumulative, Sampler, Share
from recjax.losses.objective import LossSum, Objective, Tree, find

EXCLUDED = np.float32(-1e30)


class Scores(NamedTuple):
    """Logits of targets and negatives; `hit` marks negatives that do not count, such as the target itself.

    `log_expected` is how often each negative is expected among the draws, as a logarithm.
    """

    target: Float[Array, "b l"]
    negative: Float[Array, "b l n"]
    hit: Bool[Array, "b l n"]
    log_expected: Float[Array, "#b #l n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledObjective(Objective):
    """A loss over the target and `num_negatives` drawn items.

    `sampler`: `uniform` over the catalogue, `popularity` (training count to the `power`), `in_batch` (targets of
    the batch), or `mixed`: half of them uniform, half in the batch (Yang et al. 2020, "Mixed negative sampling").
    `share`: one draw for the `batch` (of each micro-batch), for each `row` of it, or for each `position`. With
    `exclude_row` a draw that is any item of the same batch row, earlier or later, does not count. Logits are divided
    by `temperature`.

    The table is an array [v, d], or an object whose `rows(ids [b, l, n])` gives vectors [b, l, n, d] that may depend
    on the position.
    """

    hidden: str = "out.hidden"
    table: str = "out.table"
    targets: str = "batch.target_ids"
    history: str = "batch.history_ids"
    valid: str = "const.item_valid"
    count: str = "const.item_count"
    num_negatives: int = 128
    sampler: Sampler = "uniform"
    power: float = 1.0
    share: Share = "batch"
    exclude_row: bool = False
    temperature: float = 1.0

    def prepare(self, const: Tree) -> dict[str, jax.Array]:
        """Weights of the catalogue summed up, and the logarithm of their sum."""
        if self.sampler == "uniform":
            return {}
        get = functools.partial(find, out={}, batch={}, const=const)
        power = self.power if self.sampler == "popularity" else 1.0
        sums = draws.cumulate(draws.popularity_weights(power, get(self.valid), get(self.count)))
        out = {"log_total": jnp.log(sums.across[-1])}
        if self.sampler == "popularity":
            out |= sums._asdict()
        return {f"drawn/{self.name}/{name}": value for name, value in out.items()}

    def draw(self, batch: Tree, const: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Rows of the negatives, and the logarithm of how often each is expected: [1 or b, 1 or l, n]."""
        get = functools.partial(find, out={}, batch=batch, const=const)
        targets = get(self.targets)
        lead = {"batch": (1, 1), "row": (targets.shape[0], 1), "position": targets.shape}[self.share]
        n = self.num_negatives
        parts = {"uniform": n - n // 2, "in_batch": n // 2} if self.sampler == "mixed" else {self.sampler: n}
        keys = jax.random.split(key, 2) if self.sampler == "mixed" else [key]
        drawn = [self._rows(p, get, const, k, (*lead, size)) for k, (p, size) in zip(keys, parts.items(), strict=True)]
        rows = jnp.concatenate(drawn, axis=-1)
        counts = [self._log_chance(part, get, const, rows) + np.log(size) for part, size in parts.items() if size]
        expected = functools.reduce(jnp.logaddexp, counts)
        return {f"drawn/{self.name}/rows": rows, f"drawn/{self.name}/log_expected": expected}

    def _rows(self, sampler: str, get: Any, const: Tree, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if sampler == "uniform":
            return draws.draw_uniform(key, shape, num_items_of(const, self.valid))
        if sampler == "popularity":
            sums = Cumulative(*(self._prepared(const, name) for name in Cumulative._fields))
            return draws.draw_rows(key, shape, sums)
        positive = (get(self.weight) > 0).reshape(-1).astype(jnp.float32)
        return get(self.targets).reshape(-1)[draws.draw_rows(key, shape, positive)]

    def _log_chance(self, sampler: str, get: Any, const: Tree, rows: jax.Array) -> jax.Array:
        if sampler == "uniform":
            return jnp.broadcast_to(-jnp.log(num_items_of(const, self.valid).astype(jnp.float32)), rows.shape)
        count, _ = take_rows(get(self.count)[:, None], rows, by_batch=self.share != "batch")
        if self.sampler == "in_batch":  # what is in the batch may not be in the log
            count = jnp.maximum(count, 1)
        power = self.power if sampler == "popularity" else 1.0
        return draws.log_chance(count[..., 0] ** power, self._prepared(const, "log_total"))

    def _prepared(self, const: Tree, name: str) -> jax.Array:
        path = f"drawn/{self.name}/{name}"
        return const[path] if path in const else self.prepare(const)[path]

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum of `position_loss` with `weight`."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        if f"drawn/{self.name}/rows" not in batch:
            batch = {**batch, **self.draw(batch, const, key)}
        weight = get(self.weight).astype(jnp.float32)
        loss = self.position_loss(self.scores(out, batch, const), num_items_of(const, self.valid))
        return LossSum((loss * weight).sum(), weight.sum(), {})

    def position_loss(self, scores: Scores, num_items: Int[Array, ""]) -> Float[Array, "b l"]:
        """Loss of each position."""
        raise NotImplementedError(type(self).__name__)

    def scores(self, out: Tree, batch: Tree, const: Tree) -> Scores:
        """Logits of the targets and of what `draw` has put into the batch."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        hidden, table, targets = get(self.hidden), get(self.table), get(self.targets)
        rows, log_expected = (batch[f"drawn/{self.name}/{name}"] for name in ("rows", "log_expected"))
        hidden = hidden / self.temperature
        if not hasattr(table, "rows"):
            target_rows, table = take_rows(table, targets)
            negative_rows, _ = take_rows(table, rows, by_batch=self.share != "batch")
        else:
            everywhere = jnp.broadcast_to(rows, (*targets.shape, rows.shape[-1]))
            vectors = table.rows(jnp.concatenate([targets[..., None], everywhere], axis=-1))
            target_rows, negative_rows = vectors[..., 0, :], vectors[..., 1:, :]
        target = jnp.einsum("bld,bld->bl", hidden.astype(jnp.float32), target_rows.astype(jnp.float32))
        negative = _negative_logits(hidden, negative_rows.astype(hidden.dtype))
        hit = rows == targets[..., None]
        if self.exclude_row:
            hit |= draws.occur_in(rows, jnp.concatenate([get(self.history), targets], axis=1))
        return Scores(target, negative, hit, log_expected)


def num_items_of(const: Tree, valid: str = "const.item_valid") -> Int[Array, ""]:
    """Number of items of the catalogue."""
    if "num_items" in const:
        return jnp.asarray(const["num_items"], jnp.int32)
    return find(valid, out={}, batch={}, const=const).sum(dtype=jnp.int32)


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

    def position_loss(self, scores: Scores, num_items: Int[Array, ""]) -> Float[Array, "b l"]:
        """Loss of each position."""
        return sampled_softmax(scores, logq=self.logq)


def sampled_softmax(scores: Scores, *, logq: bool) -> Float[Array, "b l"]:
    """The loss of `SampledSoftmax` from logits."""
    negative = scores.negative - scores.log_expected if logq else scores.negative
    negative = jnp.where(scores.hit, EXCLUDED, negative)
    return jnp.logaddexp(scores.target, jax.nn.logsumexp(negative, axis=-1)) - scores.target
