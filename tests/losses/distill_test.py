"""Distillation losses: the exact normalisations, which numbers carry a gradient, and their stable forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.losses.binary import BinaryCrossEntropy
from recjax.losses.distill import (
    DistributionallyRobust,
    Gammas,
    Hint,
    ListDistillation,
    RankingDistillation,
    Topology,
    importance,
    last_score,
    robust,
)

B, L, K, D, V, ITEMS = 8, 4, 5, 4, 64, 40
VALID = jnp.asarray((np.arange(V) >= 2) & (np.arange(V) < 2 + ITEMS))
CONST = {
    "item_valid": VALID,
    "item_count": jnp.where(VALID, jnp.asarray(np.random.default_rng(3).integers(0, 9, V), jnp.float32), 0),
    "item/vectors": jnp.float32(np.random.default_rng(4).normal(size=(V, 3))),
}


def inputs(scale: float = 1.0) -> tuple[dict, dict]:
    draw = np.random.default_rng(0)
    out = {"hidden": draw.normal(size=(B, L, D)) * scale, "table": draw.normal(size=(V, D))}
    weight = np.asarray(draw.random((B, L)) < 0.8, np.float32)
    lists = np.stack([draw.permutation(ITEMS)[:K] + 2 for _ in range(B * L)]).reshape(B, L, K)
    lists[0, 0, 3:] = 0
    lists[1] = 0
    batch = {
        "target_ids": np.where(weight > 0, draw.integers(2, 2 + ITEMS, (B, L)), 0).astype(np.int32),
        "weight": weight,
        "teacher/rows": lists.astype(np.int32),
        "teacher/distance": np.sort(draw.random((B, L, K)), -1).astype(np.float32),
    }
    return jax.tree.map(jnp.float32, out), jax.tree.map(jnp.asarray, batch)


def weights_of(gammas: tuple[float, float, float], inside=None, distance=None, tau: float = 1.0) -> np.ndarray:
    real = jnp.asarray([[True] * 5, [True, True, False, False, False], [False] * 5])
    inside = jnp.zeros((3, 5), bool) if inside is None else inside
    distance = jnp.asarray([[0.1, 0.2, 0.4, 0.8, 1.6]] * 3) if distance is None else distance
    return np.asarray(importance(real, distance, inside, Gammas(*gammas), tau=tau, distance_scale=0.5))


@pytest.mark.parametrize("gammas", [(0.3, 0.5, 0.1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_weights_are_not_negative_and_sum_to_one(gammas: tuple[float, float, float]) -> None:
    got = weights_of(gammas, inside=jnp.asarray([[True, False, True, False, False]] * 3))
    assert (got >= 0).all()
    np.testing.assert_allclose(got.sum(-1), [1, 1, 0], atol=1e-6)
    assert not got[1, 2:].any()


def test_each_weight_alone_is_its_formula() -> None:
    place = np.exp(-np.arange(1, 6))
    np.testing.assert_allclose(weights_of((1, 0, 0))[0], place / place.sum(), rtol=1e-6)
    near = np.exp(-np.asarray([0.1, 0.2, 0.4, 0.8, 1.6]) / 0.5)
    np.testing.assert_allclose(weights_of((0, 1, 0))[0], near / near.sum(), rtol=1e-6)
    inside = jnp.asarray([[True, False, True, False, False]] * 3)
    np.testing.assert_allclose(weights_of((0, 0, 1), inside=inside)[0], [0.5, 0, 0.5, 0, 0], atol=1e-7)
    mixed = 0.3 * place / place.sum() + 0.5 * near / near.sum() + 0.1 * np.where(inside[0], 1, 1e-8)
    np.testing.assert_allclose(weights_of((0.3, 0.5, 0.1), inside=inside)[0], mixed / mixed.sum(), rtol=1e-6)


def test_kth_score_equals_sorting() -> None:
    out, _ = inputs()
    scores = np.where(VALID, np.einsum("bld,vd->blv", out["hidden"], out["table"]), -np.inf)
    want = -np.sort(-scores)[..., K - 1]
    np.testing.assert_allclose(last_score(out["hidden"], out["table"], VALID, K), want, rtol=1e-5)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        got = jax.jit(lambda h, t: last_score(h, t, VALID, K))(out["hidden"], out["table"])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_consistency_follows_the_student_and_has_no_gradient() -> None:
    out, batch = inputs()
    only = RankingDistillation(position=0, confidence=0, consistency=1, k=K, num_negatives=2)
    key = jax.random.key(0)
    overlap = only(out, batch, CONST, key).metrics["overlap"]
    turned = {**out, "hidden": -out["hidden"]}
    assert float(overlap[0]) != float(only(turned, batch, CONST, key).metrics["overlap"][0])

    def with_weights(out: dict) -> jax.Array:
        """The same loss with the weights given as numbers."""
        rows = batch["teacher/rows"]
        scores = jnp.einsum("bld,blkd->blk", out["hidden"], out["table"][rows])
        drawn = only.draw(batch, CONST, key)
        found = only.scores(out, {**batch, **drawn}, CONST)
        return only._binary(scores, weights, found)[1:].sum() * 0 + (
            (only._binary(scores, weights, found) * batch["weight"] * (rows > 1).any(-1)).sum()
        )

    rows = np.asarray(batch["teacher/rows"])
    scores = np.where(VALID, np.einsum("bld,vd->blv", out["hidden"], out["table"]), -np.inf)
    own = np.argsort(-scores)[..., :K]
    inside = (rows[..., None] == own[..., None, :]).any(-1) & (rows > 1)
    weights = np.where(rows > 1, np.where(inside, 1, 1e-8), 0)
    weights = jnp.float32(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30))
    want = jax.value_and_grad(with_weights)(out)
    got = jax.value_and_grad(lambda out: only(out, batch, CONST, key).total)(out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_negative_part_is_softplus_unless_as_published() -> None:
    out, batch = inputs()
    objective = RankingDistillation(consistency=0, k=K, num_negatives=3)
    key = jax.random.key(1)
    drawn = objective.draw(batch, CONST, key)
    scores = objective.scores(out, {**batch, **drawn}, CONST)
    zero = jnp.zeros((B, L, K))
    s = np.asarray(scores.negative, np.float64)
    for published, want in ((False, -np.log(1 - 1 / (1 + np.exp(-s)))), (True, -np.log(1 / (1 + np.exp(s - 1))))):
        got = dataclasses.replace(objective, published_negatives=published)._binary(zero, zero, scores)
        np.testing.assert_allclose(got, np.where(scores.hit, 0, want).sum(-1) / 4, rtol=1e-5)


def test_a_list_of_the_target_alone_is_the_plain_loss() -> None:
    out, batch = inputs()
    batch["teacher/rows"] = jnp.pad(batch["target_ids"][..., None], ((0, 0), (0, 0), (0, K - 1)))
    plain = BinaryCrossEntropy(name="ranking")(out, batch, CONST, jax.random.key(2)).total
    got = RankingDistillation(k=K)(out, batch, CONST, jax.random.key(2)).total
    np.testing.assert_allclose(got, plain, rtol=1e-5)


def test_softmax_form_weighs_the_sampled_softmax_of_each_item() -> None:
    out, batch = inputs()
    objective = RankingDistillation(form="softmax", num_negatives=7, share="batch", k=K, consistency=0)
    key = jax.random.key(2)
    drawn = np.asarray(objective.draw(batch, CONST, key)["drawn/ranking/rows"])[0, 0]
    rows, total = np.asarray(batch["teacher/rows"]), 0.0
    scores = np.einsum("bld,vd->blv", out["hidden"], out["table"]).astype(np.float64)
    for b, i in zip(*np.nonzero(batch["weight"]), strict=True):
        real = rows[b, i] > 1
        w = importance(
            jnp.asarray(real), batch["teacher/distance"][b, i], jnp.zeros(K, bool), Gammas(0.3, 0.5, 0), tau=1.0,
            distance_scale=1.0,
        )  # fmt: skip
        for r in np.flatnonzero(real):
            others = drawn[drawn != rows[b, i, r]]
            partition = np.exp(scores[b, i, rows[b, i, r]]) + np.exp(scores[b, i, others]).sum() * ITEMS / 7
            total += float(w[r]) * (np.log(partition) - scores[b, i, rows[b, i, r]])
    np.testing.assert_allclose(objective(out, batch, CONST, key).total, total, rtol=1e-4)


def test_rows_and_lists_permuted_together_change_nothing() -> None:
    out, batch = inputs()
    objective = RankingDistillation(k=K, share="batch", num_negatives=6)
    order = np.random.default_rng(5).permutation(B)
    drawn = objective.draw(batch, CONST, jax.random.key(0))
    want = objective(out, {**batch, **drawn}, CONST, jax.random.key(0)).total
    moved = jax.tree.map(lambda x: x[order], batch)
    got = objective({**out, "hidden": out["hidden"][order]}, {**moved, **drawn}, CONST, jax.random.key(0)).total
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_robust_loss_equals_its_naive_form_and_stays_finite() -> None:
    out, batch = inputs(0.3)
    count = np.asarray(CONST["item_count"])
    share = np.where(VALID, ((count + 1) / (count + 1)[np.asarray(VALID)].sum()) ** 0.05, 0)
    scores = np.einsum("bld,vd->blv", out["hidden"], out["table"])
    want = 0.0
    for b, i in zip(*np.nonzero(batch["weight"]), strict=True):
        s, t = scores[b, i], int(batch["target_ids"][b, i])
        total = np.exp(share * s**2)[np.asarray(VALID)].sum()
        want += np.log(total - np.exp(share[t] * s[t] ** 2) + np.exp(share[t] * (s[t] - 1) ** 2))
    got = DistributionallyRobust()(out, batch, CONST, jax.random.key(0))
    np.testing.assert_allclose(got.total, want, rtol=1e-5)
    large = jax.value_and_grad(lambda s: robust(s, batch["target_ids"], jnp.float32(share), VALID).sum())
    assert all(np.isfinite(x).all() for x in large(jnp.full((B, L, V), 300.0)))


def test_soft_list_is_least_where_student_and_teacher_agree() -> None:
    out, batch = inputs()
    rows = batch["teacher/rows"]

    def loss(scores: jax.Array) -> jax.Array:
        """Scores of the rows of the list, by hidden vectors that pick them out."""
        table = jnp.zeros((V, V)).at[jnp.arange(V), jnp.arange(V)].set(1.0)
        hidden = jnp.zeros((B, L, V)).at[jnp.arange(B)[:, None, None], jnp.arange(L)[None, :, None], rows].set(scores)
        return ListDistillation()({"hidden": hidden, "table": table}, batch, CONST, jax.random.key(0)).total

    gradient = jax.grad(loss)(-batch["teacher/distance"])
    np.testing.assert_allclose(np.where(rows > 1, gradient, 0), 0, atol=1e-6)
    assert loss(batch["teacher/distance"]) > loss(-batch["teacher/distance"])


def test_baselines_vanish_for_a_perfect_student() -> None:
    out, batch = inputs()
    turn = jnp.linalg.qr(jnp.float32(np.random.default_rng(1).normal(size=(3, 3))))[0]
    same = {"table": 2 * CONST["item/vectors"] @ turn, "projected": CONST["item/vectors"]}
    assert float(Topology()(same, batch, CONST, jax.random.key(0)).total) < 1e-8
    assert float(Topology()(out, batch, CONST, jax.random.key(0)).total) > 1e-2
    own = {"table": out["table"], "projected": out["table"]}
    assert float(Hint()(own, batch, CONST, jax.random.key(0)).total) == 0
    want = (np.square(1 - 0) * batch["weight"]).sum()
    far = {"table": out["table"], "projected": out["table"] + 1}
    np.testing.assert_allclose(Hint()(far, batch, CONST, jax.random.key(0)).total, want, rtol=1e-5)
