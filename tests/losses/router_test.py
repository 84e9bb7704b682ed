"""Load balance by its three definitions, against numpy and transformers, and under micro-batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.losses.objective import LossSum
from recjax.losses.router import RouterBalance, RouterZ, balance

N, B, L, E, K = 3, 4, 9, 5, 2


def scores_and_mask(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(N, B, L, E)) * 2, np.arange(L)[None] < np.array([[L], [4], [7], [1]])


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def outputs(scores: np.ndarray, real: np.ndarray) -> tuple[dict, dict]:
    chosen = np.argsort(-scores, axis=-1)[..., :K]
    counts = (chosen[..., None] == np.arange(E)).sum(-2) * real[None, ..., None]
    z = np.log(np.exp(scores).sum(-1)) ** 2 * real[None]
    sums = {"counts": counts, "chances": softmax(scores) * real[None, ..., None], "z": z}
    out = {f"router/{name}": jnp.asarray(x.sum(2), jnp.float32) for name, x in sums.items()}
    return out, {"segment_ids": jnp.asarray(real, jnp.int32)}


def loss(objective, out: dict, batch: dict) -> LossSum:
    return objective(out, batch, {}, jax.random.key(0))


def by_hand(scores: np.ndarray, real: np.ndarray) -> float:
    """The balance of the real tokens of one group [..., E]: E sum f P, over k."""
    tokens = scores[real]
    chosen = np.argsort(-tokens, axis=-1)[:, :K]
    f = np.array([(chosen == e).sum() / len(tokens) for e in range(E)])
    return E / K * (f * softmax(tokens).mean(0)).sum()


def test_the_definitions() -> None:
    scores, real = scores_and_mask()
    out, batch = outputs(scores, real)
    want = {
        "layers": np.mean([by_hand(s, real) for s in scores]),
        "rows": sum(np.mean([by_hand(s[b], real[b]) for s in scores]) * real[b].sum() for b in range(B)) / real.sum(),
        "hf": K * by_hand(scores, np.broadcast_to(real, scores.shape[:-1])),
    }
    for definition, value in want.items():
        got = loss(RouterBalance(definition=definition), out, batch)
        assert float(got.weight) == real.sum() == float(RouterBalance().total_weight(batch))
        np.testing.assert_allclose(got.total / got.weight, value, rtol=1e-5, err_msg=definition)
    z = loss(RouterZ(), out, batch)
    want_z = (np.log(np.exp(scores).sum(-1)) ** 2)[:, real].mean()
    np.testing.assert_allclose(z.total / z.weight, want_z, rtol=1e-5)


def test_an_even_load_is_one_and_one_expert_for_all_is_many() -> None:
    even = jnp.ones((N, E))
    np.testing.assert_allclose(balance(even, even), np.ones(N), rtol=1e-6)
    alone = jnp.asarray(np.eye(E)[:1], jnp.float32)
    np.testing.assert_allclose(balance(alone, alone), [E], rtol=1e-6)


def test_loads_by_layer() -> None:
    scores, real = scores_and_mask()
    out, batch = outputs(scores, real)
    metrics = loss(RouterBalance(), out, batch).metrics
    assert len(metrics) == 2 * N
    for i in range(N):
        counts = np.asarray(out["router/counts"][i].sum(0))
        for name, end in (("largest", counts.max()), ("smallest", counts.min())):
            total, weight = metrics[f"layer{i}/{name}_load"]
            np.testing.assert_allclose(total / weight, end / counts.mean(), rtol=1e-5)


@pytest.mark.parametrize("definition", ["rows", "layers"])
def test_micro_batches(definition: str) -> None:
    """By rows the cut changes nothing; by layers the parts are balanced each for itself and weighed by their slots."""
    scores, real = scores_and_mask()
    objective = RouterBalance(definition=definition)
    parts = [loss(objective, *outputs(scores[:, rows], real[rows])) for rows in (slice(0, 2), slice(2, 4))]
    cut = sum(float(p.total) for p in parts) / sum(float(p.weight) for p in parts)
    if definition == "rows":
        whole = loss(objective, *outputs(scores, real))
        np.testing.assert_allclose(cut, float(whole.total / whole.weight), rtol=1e-5)
    else:
        own = [np.mean([by_hand(s[rows], real[rows]) for s in scores]) for rows in (slice(0, 2), slice(2, 4))]
        np.testing.assert_allclose(cut, np.average(own, weights=[real[:2].sum(), real[2:].sum()]), rtol=1e-5)


def test_the_gradient_evens_the_load_out() -> None:
    """A step down lowers the chance of the expert that has most to do."""
    scores, real = scores_and_mask()
    scores[..., 0] += 3
    out, batch = outputs(scores, real)

    def of_scores(scores):
        chances = jnp.where(real[None, ..., None], jax.nn.softmax(scores), 0).sum(2)
        got = loss(RouterBalance(), {**out, "router/chances": chances}, batch)
        return got.total / got.weight

    slope = jax.grad(of_scores)(jnp.asarray(scores, jnp.float32))
    assert (np.asarray(slope)[..., 0][:, real] > 0).all()
    np.testing.assert_array_equal(np.asarray(slope)[:, ~real], 0)


def test_hf_is_what_transformers_computes() -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    scores, real = scores_and_mask()
    got = loss(RouterBalance(definition="hf"), *outputs(scores, real))
    gates = tuple(torch.tensor(s.reshape(-1, E), dtype=torch.float32) for s in scores)
    want = mixtral.load_balancing_loss_func(gates, E, K, torch.tensor(real, dtype=torch.int64))
    np.testing.assert_allclose(float(got.total / got.weight), float(want), rtol=1e-5)
