"""Router losses in the train step: cutting the batch changes nothing by rows, and training evens the experts' load."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax.core.module import Functional
from recjax.core.state import create
from recjax.core.step import make_train_step
from recjax.losses.router import RouterBalance, RouterZ
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig

B, L, V, E = 8, 10, 128, 4
ENCODER = TransformerConfig(
    num_layers=2,
    width=16,
    num_heads=2,
    mlp_width=16,
    position="rotary",
    norm="rms",
    ffn="swiglu",
    bias=False,
    moe=MoeConfig(num_experts=E, kernel="dense"),
)
CONST = {"item_valid": jnp.arange(V) >= 2, "num_items": jnp.int32(V - 2), "item_count": jnp.ones(V)}


def batch() -> dict[str, jax.Array]:
    draw = np.random.default_rng(0)
    real = np.arange(L)[None] < draw.integers(2, L + 1, (B, 1))
    ids = np.where(real, draw.integers(2, V, (B, L)), 0)
    fields = {"history_ids": ids, "target_ids": np.roll(ids, -1, axis=1), "segment_ids": real}
    fields = {k: jnp.asarray(v, jnp.int32) for k, v in fields.items()}
    fields["positions"] = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    return {**fields, "weight": jnp.asarray(real * (fields["target_ids"] > 0), jnp.float32)}


def step_of(accumulate: int, balance: RouterBalance, rate: float = 1e-2):
    model = Functional(functools.partial(Sequence, num_rows=V, encoder=ENCODER))
    optimizer = optax.sgd(rate)
    objectives = [CatalogueSoftmax(), balance, RouterZ()]
    step = make_train_step(model, objectives, optimizer, seed=0, accumulate=accumulate)
    return create(model.init(jax.random.key(0)), optimizer), jax.jit(step)


def test_micro_batches_give_the_same_step() -> None:
    """By rows: losses, metrics of each layer's load and the new parameters."""
    states = []
    for accumulate in (1, 4):
        state, step = step_of(accumulate, RouterBalance(definition="rows", scale=1.0))
        states.append(step(state, batch(), CONST))
    (one, metrics), (four, again) = states
    for name in ("loss", "router_balance", "router_z"):
        np.testing.assert_allclose(metrics[name], again[name], rtol=1e-5, err_msg=name)
    assert metrics["router_balance/layer1/largest_load"] >= 1 >= metrics["router_balance/layer1/smallest_load"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.params, four.params)


def test_training_evens_the_load() -> None:
    state, step = step_of(1, RouterBalance(scale=1.0), rate=0.3)
    state.params["encoder"]["layers"]["ffn"]["router"] += jnp.arange(E)[None, None] * 0.2  # some are favoured
    history = []
    for _ in range(40):
        state, metrics = step(state, batch(), CONST)
        history.append(float(metrics["router_balance"]))
    assert history[-1] < 1.05 < history[0]
