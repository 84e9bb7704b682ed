"""Continuations of a kept prompt give what rows of the prompt and one continuation each give."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.models.sequence import Sequence
from recjax.nn import cached
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig

B, L, V, M, T = 8, 12, 128, 6, 5
LLAMA = {"position": "rotary", "num_kv_heads": 2, "norm": "rms", "bias": False, "ffn": "swiglu"}
CONFIGS = {
    "learned": {},
    "llama": LLAMA,
    "mixtral": {**LLAMA, "moe": MoeConfig(num_experts=4, kernel="blocks")},
    "scanned llama": {**LLAMA, "unroll": False, "num_layers": 3},
    "one block": {"num_layers": 1},
    "post": {"position": "none", "place": "post"},
}


def model_of(name: str, **more) -> tuple[Functional, dict]:
    encoder = TransformerConfig(**{"num_layers": 2, "width": 16, "num_heads": 4, **CONFIGS[name], **more})
    model = Functional(partial(Sequence, num_rows=V, encoder=encoder, max_length=L + T))
    return model, jax.tree.map(lambda x: x + 0.02, jax.jit(model.init)(jax.random.key(0)))


def draw() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Prompts of different lengths, continuations int32 [b, m, t], and how many tokens each of these has, [b, m]."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, L + 1, B)
    real = np.arange(L) < length[:, None]
    prompt = {
        "history_ids": np.where(real, rng.integers(2, V, (B, L)), 0).astype(np.int32),
        "positions": np.where(real, np.arange(L), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "query_at": (length - 1)[:, None].astype(np.int32),
    }
    lengths = rng.integers(1, T + 1, (B, M)).astype(np.int32)
    lengths[0, 0] = T
    ids = np.where(np.arange(T) < lengths[..., None], rng.integers(2, V, (B, M, T)), 0).astype(np.int32)
    return prompt, ids, lengths


def branched(model: Functional, params: dict, prompt, ids, lengths) -> np.ndarray:
    @jax.jit
    def run(params, prompt, ids, slots):
        bound: Any = model.bind(params)
        return bound.branch(bound.prefill(prompt)[1], ids, slots)

    return np.asarray(run(params, prompt, ids, lengths - 1))


def alone(model: Functional, params: dict, prompt, ids, lengths) -> np.ndarray:
    """Every continuation behind its prompt in a row of its own."""
    rows = {n: np.zeros((B * M, L + T), np.int32) for n in ("history_ids", "positions", "segment_ids")}
    ends = np.zeros((B * M, 1), np.int32)
    for at in range(B * M):
        row, number = divmod(at, M)
        tokens = prompt["history_ids"][row][prompt["segment_ids"][row] > 0]
        tokens = np.concatenate([tokens, ids[row, number, : lengths[row, number]]])
        span = slice(0, len(tokens))
        rows["history_ids"][at, span], rows["segment_ids"][at, span] = tokens, 1
        rows["positions"][at, span] = np.arange(len(tokens))
        ends[at] = len(tokens) - 1
    hidden = jax.jit(partial(model.apply, train=False, key=None))(params, rows)["hidden"]
    return np.take_along_axis(np.asarray(hidden), ends[..., None], axis=1).reshape(B, M, -1)


HEAVY = ("scanned llama", "one block", "post")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.heavy if n in HEAVY else ()) for n in CONFIGS])
def test_continuations_equal_rows_of_their_own(name: str) -> None:
    model, params = model_of(name)
    case = draw()
    np.testing.assert_allclose(branched(model, params, *case), alone(model, params, *case), rtol=1e-5, atol=1e-5)


def test_how_many_are_taken_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = model_of("llama")
    want = branched(model, params, *draw())
    for cells in (0, B * 4 * T * (L + T) * 2):  # one at a time, two at a time
        monkeypatch.setitem(cached._CELLS, "cpu", cells)
        np.testing.assert_allclose(branched(model, params, *draw()), want, rtol=1e-6, atol=1e-6)


def test_the_most_that_divides() -> None:
    assert [cached._at_once(6, cached._CELLS["cpu"] // n) for n in (1, 2, 3, 4, 5, 6, 7)] == [1, 2, 3, 3, 3, 6, 6]


def test_a_continuation_knows_neither_the_others_nor_padding() -> None:
    model, params = model_of("llama")
    prompt, ids, lengths = draw()
    want = branched(model, params, prompt, ids, lengths)
    other = np.where(np.arange(T) < lengths[..., None], ids, 77)  # behind their ends
    other[:, 1] = 5
    got = branched(model, params, prompt, other, lengths)
    np.testing.assert_array_equal(np.delete(got, 1, axis=1), np.delete(want, 1, axis=1))
    assert np.abs(got[:, 1] - want[:, 1]).max() > 1e-3


def test_the_same_on_a_mesh() -> None:
    model, params = model_of("llama")
    prompt, ids, lengths = draw()
    want = branched(model, params, prompt, ids, lengths)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
        fed = mesh.put_batch({**prompt, "suffix_ids": ids, "suffix_at": lengths})
        got = branched(model, placed, {n: fed[n] for n in prompt}, fed["suffix_ids"], fed["suffix_at"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_biases_by_distance_are_refused() -> None:
    encoder = TransformerConfig(num_layers=1, width=16, position="none", relative="t5")
    model = Functional(partial(Sequence, num_rows=V, encoder=encoder))
    params = jax.eval_shape(model.init, jax.random.key(0))
    prompt, ids, lengths = draw()

    def run(params: dict, prompt, ids, slots) -> jax.Array:
        bound: Any = model.bind(params)
        return bound.branch(bound.prefill(prompt)[1], ids, slots)

    with pytest.raises(ConfigError, match="several continuations"):
        jax.eval_shape(run, params, prompt, ids, lengths)
