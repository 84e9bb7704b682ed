"""What a student learns from the ranked lists and the item vectors of a teacher.

`RankingDistillation` is the importance-aware one of DLLM2Rec (Cui et al. 2024, arXiv 2405.00338), of which plain
ranking distillation is a special case; `ListDistillation`, `Hint` and `Topology` are what it is compared with. The
teacher's lists come in the batch, the best item first: `teacher/rows` int32 [b, l, k] (0: none) and
`teacher/distance` float32 [b, l, k]; its item vectors are a fact, `item/vectors` [v, c].
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.core.rows import Split, take_rows
from recjax.core.sharding import active
from recjax.losses.objective import LossSum, Objective, Tree, find
from recjax.losses.sampled import SampledObjective, Scores, num_items_of, sampled_softmax

_ABSENT = 1e-8  # the consistency of an item that is not in the student's own list


class Gammas(NamedTuple):
    """How much position, confidence and consistency count."""

    position: float
    confidence: float
    consistency: float


def importance(
    real: Bool[Array, "*n k"],
    distance: Float[Array, "*n k"],
    inside: Bool[Array, "*n k"],
    gammas: Gammas,
    *,
    tau: float,
    distance_scale: float,
) -> Float[Array, "*n k"]:
    """Weights of the items of a list: not negative, and of sum 1 unless none is `real`.

    (g_p w_p + g_c w_c + g_o w_o) / sum, with w_p = softmax of -r / tau over the places r = 1 .. k, w_c = softmax of
    -distance / distance_scale, and w_o = 1 for items `inside` the student's list of today, else 1e-8.
    """
    place = jnp.arange(1, real.shape[-1] + 1, dtype=jnp.float32)
    w_p = _softmax(jnp.broadcast_to(-place / tau, real.shape), real)
    w_c = _softmax(-distance / distance_scale, real)
    w_o = jnp.where(inside, 1.0, _ABSENT)
    total = jnp.where(real, gammas.position * w_p + gammas.confidence * w_c + gammas.consistency * w_o, 0)
    return total / jnp.maximum(total.sum(-1, keepdims=True), 1e-30)


def last_score(
    hidden: Float[Array, "b l d"], table: Float[Array, "v d"], valid: Bool[Array, " v"], k: int
) -> Float[Array, "b l"]:
    """The k-th best score of each position over the valid rows; no gradient. Holds [b, l, v] scores."""
    hidden, table = jax.lax.stop_gradient((hidden, table))
    mesh = active()

    def local(split: Split | None, hidden: jax.Array, table: jax.Array, valid: jax.Array) -> jax.Array:
        hidden = hidden if split is None else split.gather(hidden)
        scores = jnp.einsum("bld,vd->blv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        best = jax.lax.top_k(jnp.where(valid[None, None], scores, -jnp.inf), min(k, table.shape[0]))[0]
        if split is None:
            return best.min(-1)  # of a slice of top_k XLA makes a sort of the whole catalogue on a CPU
        best = jax.lax.all_gather(best, split.items, axis=2, tiled=True) if split.items else best
        return split.own_part(jax.lax.top_k(best, min(k, best.shape[-1]))[0].min(-1))

    if mesh is None or not (mesh.axes_of("items") or mesh.axes_of("batch")):
        return local(None, hidden, table, valid)
    split = Split(mesh, True)
    inputs = (split.index, split.table, split.table)
    return split.island(functools.partial(local, split), inputs, split.index)(hidden, table, valid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingDistillation(SampledObjective):
    """Every item of the teacher's list is a target of its own weight (`importance`), against drawn negatives.

    `form` "binary": (sum_r w_r (-log sigmoid(s_r)) - sum_j log(1 - sigmoid(s_j))) / (1 + n), which with one negative
    goes beside `BinaryCrossEntropy`; the published code has log sigmoid(1 - s_j) in place of the last term
    (`published_negatives`). `form` "softmax": sum_r w_r times the sampled softmax of item r, beside `SampledSoftmax`.

    Only the first `k` items of a list count. `position`, `confidence`, `consistency` are the gammas; a consistency
    above 0 ranks the whole catalogue at every position. `distance_scale` divides distances, whose scale is the
    teacher's own. Plain ranking distillation (Tang and Wang 2018) is gammas (1, 0, 0).
    """

    name: str = "ranking"
    num_negatives: int = 1
    share: Literal["batch", "row", "position"] = "position"
    rows: str = "batch.teacher/rows"
    distance: str = "batch.teacher/distance"
    form: Literal["binary", "softmax"] = "binary"
    k: int = 10
    position: float = 0.3
    confidence: float = 0.5
    consistency: float = 0.1
    tau: float = 1.0
    distance_scale: float = 1.0
    logq: bool = True
    published_negatives: bool = False

    @property
    def reads_catalogue(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the student's own ranking is needed."""
        return self.consistency > 0

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over positions with a list; the metric `overlap` is the share of the list in the student's own."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        if f"drawn/{self.name}/rows" not in batch:
            batch = {**batch, **self.draw(batch, const, key)}
        rows = get(self.rows)[..., : self.k]
        real = rows > 1
        hidden = get(self.hidden) / self.temperature
        vectors, table = take_rows(get(self.table), jnp.where(real, rows, 0))
        teacher = jnp.einsum("bld,blkd->blk", hidden.astype(jnp.float32), vectors.astype(jnp.float32))
        inside = jnp.zeros(real.shape, bool)
        if self.consistency > 0:
            least = last_score(hidden, table, get(self.valid), rows.shape[-1])
            inside = real & (jax.lax.stop_gradient(teacher) >= least[..., None] - 1e-5 * jnp.abs(least[..., None]))
        gammas = Gammas(self.position, self.confidence, self.consistency)
        distance = get(self.distance)[..., : self.k]
        weights = jax.lax.stop_gradient(
            importance(real, distance, inside, gammas, tau=self.tau, distance_scale=self.distance_scale)
        )
        scores = self.scores({**out, self.table.partition(".")[2]: table}, batch, const)
        loss = self._softmax(teacher, weights, rows, scores, batch) if self.form == "softmax" else None
        loss = self._binary(teacher, weights, scores) if loss is None else loss
        has_list = real.any(-1)
        weight = get(self.weight).astype(jnp.float32) * has_list
        total = get(self.weight).astype(jnp.float32).sum()
        overlap = (inside.sum(-1) / jnp.maximum(real.sum(-1), 1) * weight).sum()
        metrics = {"overlap": (overlap, weight.sum())} if self.consistency > 0 else {}
        return LossSum((loss * weight).sum(), total, metrics)

    def _binary(self, teacher: jax.Array, weights: jax.Array, scores: Scores) -> jax.Array:
        positive = (weights * jax.nn.softplus(-teacher)).sum(-1)
        negative = jax.nn.softplus(scores.negative - (1.0 if self.published_negatives else 0.0))
        return (positive + jnp.where(scores.hit, 0, negative).sum(-1)) / (1 + scores.negative.shape[-1])

    def _softmax(
        self, teacher: jax.Array, weights: jax.Array, rows: jax.Array, scores: Scores, batch: Tree
    ) -> jax.Array:
        drawn = batch[f"drawn/{self.name}/rows"]
        loss = jnp.zeros(teacher.shape[:-1])
        for r in range(teacher.shape[-1]):
            of_item = Scores(teacher[..., r], scores.negative, drawn == rows[..., r, None], scores.log_expected)
            loss += weights[..., r] * sampled_softmax(of_item, logq=self.logq)
        return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListDistillation(Objective):
    """Cross-entropy between teacher and student over the items of the teacher's list (soft targets, Hinton 2015).

    -sum_r softmax(-distance / temperature)_r log softmax(score / temperature)_r, times temperature^2.
    """

    name: str = "list"
    hidden: str = "out.hidden"
    table: str = "out.table"
    rows: str = "batch.teacher/rows"
    distance: str = "batch.teacher/distance"
    temperature: float = 1.0
    distance_scale: float = 1.0

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Draws nothing; `key` is not used."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        rows = get(self.rows)
        real = rows > 1
        vectors, _ = take_rows(get(self.table), jnp.where(real, rows, 0))
        scores = jnp.einsum("bld,blkd->blk", get(self.hidden).astype(jnp.float32), vectors.astype(jnp.float32))
        soft = _softmax(-get(self.distance) / (self.distance_scale * self.temperature), real)
        student = jnp.where(real, scores / self.temperature, -1e30)
        loss = -(soft * jnp.where(real, jax.nn.log_softmax(student, axis=-1), 0)).sum(-1) * self.temperature**2
        weight = get(self.weight).astype(jnp.float32)
        return LossSum((loss * weight * real.any(-1)).sum(), weight.sum(), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hint(Objective):
    """Mean square of the difference between the vectors of the targets and what the model projects the teacher's to.

    FitNets (Romero et al. 2015) on item vectors; a model that projects gives `projected` [v, d] beside its table.
    """

    name: str = "hint"
    table: str = "out.table"
    projected: str = "out.projected"
    targets: str = "batch.target_ids"

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Draws nothing; `key` is not used."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        own, _ = take_rows(get(self.table), get(self.targets))
        projected, _ = take_rows(get(self.projected), get(self.targets))
        weight = get(self.weight).astype(jnp.float32)
        return LossSum((jnp.square(own - projected).mean(-1) * weight).sum(), weight.sum(), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology(Objective):
    """The cosines between the targets of a row shall be those that the teacher's vectors have (after Kang et al. 2021).

    Mean over the other targets of a row of the squared difference of cosines; needs no projection.
    """

    name: str = "topology"
    table: str = "out.table"
    vectors: str = "const.item/vectors"
    targets: str = "batch.target_ids"

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Draws nothing; `key` is not used."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        targets, weight = get(self.targets), get(self.weight).astype(jnp.float32)
        mine, theirs = (_cosines(take_rows(get(path), targets)[0]) for path in (self.table, self.vectors))
        pairs = (weight > 0)[:, None, :] & ~jnp.eye(targets.shape[1], dtype=bool)[None]
        loss = jnp.where(pairs, jnp.square(mine - theirs), 0).sum(-1) / jnp.maximum(pairs.sum(-1), 1)
        return LossSum((loss * weight).sum(), weight.sum(), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionallyRobust(Objective):
    """DROS (Yang et al. 2023) as in DLLM2Rec's code, the mean square error's worst case around the log's popularity.

    log(sum over items j but the target of exp(p_j s_j^2 / b) + exp(p_t (s_t - 1)^2 / b)), with p_j = the share of
    (count_j + 1) to the `power`, not normalised again. Holds [b, l, v] scores, so it is for catalogues of thousands.
    """

    name: str = "robust"
    hidden: str = "out.hidden"
    table: str = "out.table"
    targets: str = "batch.target_ids"
    valid: str = "const.item_valid"
    count: str = "const.item_count"
    power: float = 0.05
    b: float = 1.0

    @property
    def reads_catalogue(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """It does."""
        return True

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Draws nothing; `key` is not used."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        scores = jnp.einsum("bld,vd->blv", get(self.hidden), get(self.table), preferred_element_type=jnp.float32)
        count = jnp.where(get(self.valid), get(self.count) + 1, 0)
        share = (count / (get(self.count).sum() + num_items_of(const, self.valid))) ** self.power
        weight = get(self.weight).astype(jnp.float32)
        loss = robust(scores, get(self.targets), share, get(self.valid), b=self.b)
        return LossSum((loss * weight).sum(), weight.sum(), {})


def robust(
    scores: Float[Array, "b l v"],
    targets: Int[Array, "b l"],
    share: Float[Array, " v"],
    valid: Bool[Array, " v"],
    *,
    b: float = 1.0,
) -> Float[Array, "b l"]:
    """The loss of `DistributionallyRobust` by one logsumexp, in which the target's term takes its other form."""
    is_target = jnp.arange(scores.shape[-1])[None, None] == targets[..., None]
    terms = share[None, None] * jnp.square(scores - is_target) / b
    return jax.nn.logsumexp(jnp.where(valid[None, None], terms, -1e30), axis=-1)


def _softmax(x: jax.Array, real: jax.Array) -> jax.Array:
    x = jnp.where(real, x, -1e30)
    e = jnp.where(real, jnp.exp(x - x.max(-1, keepdims=True)), 0)
    return e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)


def _cosines(x: jax.Array) -> jax.Array:
    x = x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
    return jnp.einsum("bld,bmd->blm", x, x)
