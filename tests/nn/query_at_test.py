"""Asking for a few slots gives what computing all of them gives there, whatever the blocks are made of."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig
from recjax.nn.rotary import RopeScaling

B, L, V = 8, 24, 128
MIXTRAL = {"position": "rotary", "num_kv_heads": 2, "norm": "rms", "ffn": "swiglu", "bias": False}
CONFIGS = {
    "pre, learned": {},
    "post": {"place": "post"},
    "one block": {"num_layers": 1},
    "scanned": {"unroll": False, "num_layers": 3},
    "rotary, grouped heads, rms": {"position": "rotary", "num_kv_heads": 2, "norm": "rms", "bias": False},
    "mixtral, longer than trained": {
        **MIXTRAL,
        "moe": MoeConfig(num_experts=4, kernel="blocks"),
        "rope_scaling": RopeScaling(kind="yarn", factor=2.0, trained_length=8),
    },
    "qwen": {**MIXTRAL, "qk_norm": True, "qkv_bias": True, "position": "none", "rope_theta": 1e6},
    "gated residual": {"residual": "gated", "ffn": "swiglu"},
    "library": {"kernel": "library"},
    "hstu": {"attention": "hstu", "ffn": "none", "relative": "position", "position": "none", "max_length": L},
}


def model_of(**config):
    encoder = TransformerConfig(**{"num_layers": 2, "width": 16, "num_heads": 4, **config})
    return Functional(partial(Sequence, num_rows=V, encoder=encoder, max_length=L, normalize=True))


def batch():
    """Rows with two or three packed histories, and the last slot of each; the unused places ask for slot 0."""
    rng = np.random.default_rng(0)
    out = {k: np.zeros((B, L), np.int32) for k in ("history_ids", "positions", "segment_ids")}
    at = np.full((B, 3), -1, np.int32)
    for row in range(B):
        ends = np.sort(rng.choice(np.arange(2, L), 2 + row % 2, replace=False))
        for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            span = slice(start, stop)
            out["history_ids"][row, span] = rng.integers(2, V, stop - start)
            out["positions"][row, span] = np.arange(stop - start)
            out["segment_ids"][row, span] = number + 1
            at[row, number] = stop - 1
    return out, at


HEAVY = ("one block", "library")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.heavy if n in HEAVY else ()) for n in CONFIGS])
def test_a_few_slots_are_what_they_are_among_all(name):
    model = model_of(**CONFIGS[name])
    params = jax.tree.map(lambda x: x * 1.5 + 0.01, model.init(jax.random.key(0)))
    inputs, at = batch()
    run = jax.jit(partial(model.apply, train=False, key=None))
    hidden = run(params, inputs)["hidden"]
    found = run(params, {**inputs, "query_at": at})
    expected = np.take_along_axis(np.asarray(hidden), np.maximum(at, 0)[..., None], axis=1)
    assert "hidden" not in found and found["query"].shape == (*at.shape, 16)
    np.testing.assert_allclose(found["query"], expected, rtol=2e-5, atol=2e-6)


def test_the_same_on_a_mesh():
    model = model_of()
    params, (inputs, at) = model.init(jax.random.key(0)), batch()
    expected = jax.jit(partial(model.apply, train=False, key=None))(params, {**inputs, "query_at": at})["query"]
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
        run = jax.jit(partial(model.apply, train=False, key=None))
        found = run(placed, mesh.put_batch({**inputs, "query_at": at}))["query"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_training_answers_at_every_slot():
    model = model_of()
    inputs, at = batch()
    run = partial(model.apply, train=True, key=None)
    out = jax.eval_shape(run, model.init(jax.random.key(0)), {**inputs, "query_at": at})
    assert out["hidden"].shape == (B, L, 16)
