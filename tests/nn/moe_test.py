"""A mixture of experts against a loop over tokens, its ways of computing, and that no token depends on another."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig, fan_in_normal
from recjax.nn.grouped import grouped_product
from recjax.nn.moe import Moe, MoeConfig

B, L, D, F, E = 3, 7, 8, 12, 4


def moe(**config) -> Functional:
    sizes = {"kind": "swiglu", "width": D, "mlp_width": F, "init": fan_in_normal, "out_init": fan_in_normal}
    return Functional(lambda rngs: Moe(MoeConfig(**{"num_experts": E, **config}), **sizes, rngs=rngs))


def inputs() -> tuple[jax.Array, jax.Array]:
    draw = np.random.default_rng(0)
    real = np.arange(L)[None] < np.array([[L], [4], [0]])
    return jnp.asarray(draw.normal(size=(B, L, D)), jnp.float32), jnp.asarray(real)


def by_hand(params: dict, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One token: what comes out, which experts it chose, and its scores."""
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    scores = x @ w["router"]
    chosen = np.argsort(-scores, kind="stable")[:k]
    share = np.exp(scores[chosen] - scores[chosen].max())
    out = np.zeros(D)
    for e, p in zip(chosen, share / share.sum(), strict=True):
        gate = x @ w["gate"][e]
        out += p * ((gate / (1 + np.exp(-gate)) * (x @ w["inner"][e])) @ w["outer"][e])
    return out, chosen, scores


@pytest.mark.parametrize("kernel", ["ragged_dot", "blocks", "dense"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_a_loop_over_tokens_gives_the_same(kernel: str, k: int) -> None:
    model, (x, real) = moe(top_k=k, kernel=kernel), inputs()
    params = model.init(jax.random.key(0))
    out, routing = jax.jit(model.apply)(params, x, real)
    want, counts, chances, z = np.zeros((B, L, D)), np.zeros((B, E)), np.zeros((B, E)), np.zeros(B)
    for b, i in zip(*np.nonzero(real), strict=True):
        want[b, i], chosen, scores = by_hand(params, np.asarray(x[b, i], np.float64), k)
        counts[b] += np.bincount(chosen, minlength=E)
        chances[b] += np.exp(scores) / np.exp(scores).sum()
        z[b] += math.log(np.exp(scores).sum()) ** 2
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(routing.counts, counts)
    np.testing.assert_allclose(routing.chances, chances, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routing.z, z, rtol=1e-5)


def test_all_kernels_have_the_same_gradients() -> None:
    x, real = inputs()
    params = moe().init(jax.random.key(1))

    def gradients(kernel: str):
        def loss(params, x):
            out, routing = moe(kernel=kernel).apply(params, x, real)
            return (out**2).sum() + (routing.chances**2).sum() + routing.z.sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    want = gradients("dense")
    for kernel in ("ragged_dot", "blocks"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(kernel), want)


@pytest.mark.parametrize("sizes", [[300, 0, 5, 130], [0, 0, 0, 435], [435, 0, 0, 0], [128, 128, 0, 100], [0, 0, 0, 0]])
def test_products_by_blocks(sizes: list[int]) -> None:
    """Groups of none, of a part of a block, of several; and rows of nobody behind them."""
    draw = np.random.default_rng(0)
    x, weights = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((440, D), (E, D, F)))
    inside = (np.arange(440) < sum(sizes))[:, None]

    def outcome(kernel: str):
        def loss(x, weights):
            out = grouped_product(x, weights, jnp.asarray(sizes, jnp.int32), kernel)
            return jnp.where(inside, out**2, 0).sum()

        value, (d_x, d_weights) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weights)
        return value, jnp.where(inside, d_x, 0), d_weights

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), outcome("blocks"), outcome("ragged_dot")
    )


def test_a_token_gives_alone_what_it_gives_among_others() -> None:
    """All tokens but one choose the same expert: whatever they do, that one is neither dropped nor changed."""
    model = moe()
    params = model.init(jax.random.key(0))
    crowd = jnp.tile(jnp.ones((1, 1, D)), (1, 30, 1)) * 3
    one = jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, D)), jnp.float32)
    together, routing = model.apply(params, jnp.concatenate([crowd, one], axis=1))
    alone, _ = model.apply(params, one)
    assert routing.counts.max() >= 30
    np.testing.assert_allclose(together[:, -1:], alone, rtol=1e-6, atol=1e-6)


MIXTRAL = {
    "num_layers": 3,
    "width": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_width": 24,
    "position": "rotary",
    "norm": "rms",
    "ffn": "swiglu",
    "bias": False,
}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_routers_of_all_layers_are_among_the_outputs(remat: str) -> None:
    """Scanned over layers or written out, computed anew or not: every real token makes its choices in each layer."""
    draw = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]], np.int32)
    batch = {"history_ids": draw.integers(2, 60, (2, 6)) * (segments > 0), "segment_ids": segments}
    batch["positions"] = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]])
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}

    def outcome(**more):
        encoder = TransformerConfig(**MIXTRAL, moe=MoeConfig(num_experts=E), **more)
        model = Functional(partial(Sequence, num_rows=128, encoder=encoder))

        def loss(params):
            out = model.apply(params, batch, train=True, key=jax.random.key(0))
            return (out["hidden"] ** 2).sum() + (out["router/chances"] ** 2).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(model.init(jax.random.key(0)))

    (gradients, out), want = outcome(remat=remat, unroll=False), outcome(unroll=True)
    assert out["router/counts"].shape == (3, 2, E)
    np.testing.assert_array_equal(out["router/counts"].sum(-1), [[2 * 5, 2 * 2]] * 3)
    np.testing.assert_allclose(out["router/chances"].sum(-1), [[5, 2]] * 3, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), (gradients, out), want)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoeConfig(num_experts=2, top_k=3), "3 of 2 experts"),
        (lambda: TransformerConfig(moe=MoeConfig(), ffn="swiglu"), "bias = True"),
        (lambda: TransformerConfig(moe=MoeConfig(), ffn="gelu", bias=False), "ffn = 'gelu'"),
        (
            lambda: moe(kernel="tokamax").apply(moe().init(jax.random.key(0)), inputs()[0]),
            "tokamax does not run on cpu",
        ),
        (
            lambda: moe(kernel="megablox").apply(moe().init(jax.random.key(0)), inputs()[0]),
            "megablox does not run on cpu",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
