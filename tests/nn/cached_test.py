"""Tokens one at a time give what running the whole row again gives, and beams share nothing but their prompt."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.models.masked import MaskedSequence
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.recurrent import RecurrentConfig

B, L, V, M, STEPS = 8, 12, 128, 3, 4
CONFIGS = {
    "learned": {},
    "none, post": {"position": "none", "place": "post"},
    "one block": {"num_layers": 1},
    "scanned": {"unroll": False, "num_layers": 3},
    "rotary, grouped heads, rms": {"position": "rotary", "num_kv_heads": 2, "norm": "rms", "bias": False},
    "gated residual": {"residual": "gated", "ffn": "swiglu"},
    "library": {"kernel": "library", "position": "learned_rotary"},
    "t5": {"position": "none", "relative": "t5", "score_scale": 1.0, "norm": "rms", "bias": False, "init": "t5"},
}


def model_of(name: str = "learned", **more) -> tuple[Functional, dict]:
    encoder = TransformerConfig(**{"num_layers": 2, "width": 16, "num_heads": 4, **CONFIGS[name]})
    model = Functional(partial(Sequence, num_rows=V, encoder=encoder, max_length=L + STEPS, **more))
    params = jax.tree.map(lambda x: x + 0.02, jax.jit(model.init)(jax.random.key(0)))
    return model, params


def prompts(before: int = 0) -> dict[str, np.ndarray]:
    """Rows with a prompt of another length each, after `before` tokens of another example."""
    rng = np.random.default_rng(0)
    out = {k: np.zeros((B, L), np.int32) for k in ("history_ids", "positions", "segment_ids")}
    out["query_at"] = np.zeros((B, 1), np.int32)
    for row in range(B):
        stop = before + 1 + row % (L - before)
        out["history_ids"][row, :stop] = rng.integers(2, V, stop)
        out["positions"][row, :stop] = [*range(before), *range(stop - before)]
        out["segment_ids"][row, :stop] = [1] * before + [1 + bool(before)] * (stop - before)
        out["query_at"][row] = stop - 1
    return out


def whole(batch: dict[str, np.ndarray], answers: np.ndarray) -> dict[str, np.ndarray]:
    """A row for every beam, its answer [b, m, s] after the prompt."""
    steps = answers.shape[2]
    out = {k: np.repeat(np.pad(v, ((0, 0), (0, steps))), M, axis=0) for k, v in batch.items() if k != "query_at"}
    for row, answer in enumerate(answers.reshape(-1, steps)):
        last = int(batch["query_at"][row // M, 0])
        span = slice(last + 1, last + 1 + steps)
        out["history_ids"][row, span] = answer
        out["positions"][row, span] = out["positions"][row, last] + 1 + np.arange(steps)
        out["segment_ids"][row, span] = out["segment_ids"][row, last]
    return out


def cached(model: Functional, params: dict, batch, answers: np.ndarray) -> np.ndarray:
    """[b, m, 1 + s, d]: the output after the prompt and after every token of the answers."""

    @jax.jit
    def run(params, batch, answers):
        bound = model.bind(params)
        first, memory = bound.prefill(batch)
        suffix = bound.start(memory, M, STEPS)

        def step(suffix, xs):
            out, suffix = bound.extend(memory, suffix, xs[0], xs[1])
            return suffix, out

        steps = jnp.arange(answers.shape[2])
        _, outs = jax.lax.scan(step, suffix, (jnp.moveaxis(answers, 2, 0), steps))
        first = jnp.broadcast_to(first[:, None, None], (B, M, 1, first.shape[-1]))
        return jnp.concatenate([first, jnp.moveaxis(outs, 0, 2)], axis=2), memory.table

    return run(params, batch, answers)


def expected(model: Functional, params: dict, batch, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = jax.jit(partial(model.apply, train=False, key=None))(params, whole(batch, answers))
    slots = np.repeat(batch["query_at"], M, axis=0) + np.arange(answers.shape[2] + 1)
    hidden = np.take_along_axis(np.asarray(out["hidden"]), slots[..., None], axis=1)
    return hidden.reshape(B, M, *hidden.shape[1:]), np.asarray(out["table"])


ANSWERS = np.random.default_rng(1).integers(2, V, (B, M, STEPS)).astype(np.int32)


HEAVY = ("none, post", "one block", "library", "gated residual")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.heavy if n in HEAVY else ()) for n in CONFIGS])
def test_one_token_at_a_time_equals_the_whole_row(name: str) -> None:
    model, params = model_of(name)
    got, want = cached(model, params, prompts(), ANSWERS), expected(model, params, prompts(), ANSWERS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("name", ["t5", pytest.param("rotary, grouped heads, rms", marks=pytest.mark.heavy)])
def test_an_example_before_the_prompt_in_its_row_is_not_seen(name: str) -> None:
    model, params = model_of(name, normalize=True, scale_embedding=True)
    batch = prompts(before=5)
    got, want = cached(model, params, batch, ANSWERS), expected(model, params, batch, ANSWERS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("name", ["learned", pytest.param("t5", marks=pytest.mark.heavy)])
def test_a_prompt_read_from_both_sides(name: str) -> None:
    """With a prefix the prompt's own tokens see each other, and the answer stays causal."""
    model, params = model_of(name)
    batch = prompts()
    batch["prefix"] = (batch["segment_ids"] > 0).astype(np.int32)
    got, want = cached(model, params, batch, ANSWERS), expected(model, params, batch, ANSWERS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    plain = cached(model, params, prompts(), ANSWERS)[0]
    assert np.abs(got[0] - plain)[2:].max() > 1e-3


def test_reordered_beams_go_on_from_where_they_were() -> None:
    """What a beam search does: the suffix alone is taken along when beams change places."""
    model, params = model_of()
    order = np.array([2, 0, 0])

    @jax.jit
    def run(params, batch, answers):
        bound = model.bind(params)
        _, memory = bound.prefill(batch)
        _, suffix = bound.extend(memory, bound.start(memory, M, 2), answers[:, :, 0], 0)
        suffix = jax.tree.map(lambda x: x[:, order], suffix)
        return bound.extend(memory, suffix, answers[:, :, 1], 1)[0]

    got = run(params, prompts(), ANSWERS)
    answers = np.stack([ANSWERS[:, order, 0], ANSWERS[:, :, 1]], axis=2)
    want = expected(model, params, prompts(), answers)[0]
    np.testing.assert_allclose(got, want[:, :, 2], rtol=1e-5, atol=1e-5)


def test_the_same_on_a_mesh() -> None:
    model, params = model_of("rotary, grouped heads, rms")
    want, _ = cached(model, params, prompts(), ANSWERS)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
        got, _ = cached(model, placed, mesh.put_batch(prompts()), ANSWERS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


HSTU = TransformerConfig(num_layers=1, width=16, attention="hstu", ffn="none", position="none", max_length=L)


@pytest.mark.parametrize(
    "make",
    [
        partial(Sequence, encoder=HSTU),
        partial(Sequence, encoder=RecurrentConfig(width=16)),
        partial(MaskedSequence, encoder=TransformerConfig(num_layers=1, width=16, causal=False)),
    ],
    ids=["hstu", "gru", "masked"],
)
def test_what_cannot_answer_token_by_token_says_so(make) -> None:
    model = Functional(partial(make, num_rows=V))
    with pytest.raises(ConfigError, match="token by token"):
        jax.eval_shape(lambda key, b: model.bind(model.init(key)).prefill(b), jax.random.key(0), prompts())
