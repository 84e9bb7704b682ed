"""The encoder-decoder: a numpy transcription of T5 1.1, packing, devices, and answers made token by token."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.models.seq2seq import EncoderDecoder, t5_stack

V, B, PROMPT, ANSWER, M = 128, 8, 9, 5, 3
SIZES = {"width": 16, "num_heads": 4, "head_dim": 6, "mlp_width": 24}


def model_of(**change) -> Functional:
    encoder = t5_stack(num_layers=2, **SIZES, **change)
    decoder = t5_stack(num_layers=3, is_decoder=True, **SIZES, **change)
    return Functional(partial(EncoderDecoder, num_rows=V, encoder=encoder, decoder=decoder, embedding_dropout=0.1))


@functools.cache
def params_of() -> dict:
    """Away from the norms' ones."""
    params = jax.jit(model_of().init)(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.02, params)


def rows_of(prompts: list[list[list[int]]], answers: list[list[list[int]]], prompt=PROMPT, answer=ANSWER) -> dict:
    """One row for each entry, which lists the prompts packed into it and their answers so far."""
    out = {}
    for prefix, ids, rows, length in (
        ("", "history_ids", prompts, prompt),
        ("decoder_", "decoder_ids", answers, answer),
    ):
        fields = {name: np.zeros((len(rows), length), np.int32) for name in ("ids", "positions", "segment_ids")}
        for i, examples in enumerate(rows):
            at = 0
            for number, tokens in enumerate(examples, 1):
                span = slice(at, at + len(tokens))
                fields["ids"][i, span], fields["segment_ids"][i, span] = tokens, number
                fields["positions"][i, span] = np.arange(len(tokens))
                at += len(tokens)
        out |= {ids: fields["ids"]} | {prefix + name: fields[name] for name in ("positions", "segment_ids")}
    return {k: jnp.asarray(v) for k, v in out.items()}


def batch() -> dict:
    """A prompt and an answer in each row, of different lengths."""
    draw = np.random.default_rng(0)
    prompts = [[draw.integers(2, V, 1 + i % PROMPT).tolist()] for i in range(B)]
    return rows_of(prompts, [[[0, *draw.integers(2, V, 4).tolist()]] for _ in range(B)])


@functools.cache
def _hidden():
    return jax.jit(lambda p, b: model_of().apply(p, b, train=False, key=None)["hidden"])


def bucket(apart: int, two_sided: bool) -> int:
    """The bucket of query - key, as the T5 paper's code has it."""
    first, n, buckets = 0, apart, 32
    if two_sided:
        buckets = 16
        first = 16 if apart < 0 else 0
        n = abs(apart)
    n, exact = max(n, 0), buckets // 2
    if n < exact:
        return first + n
    return first + min(buckets - 1, exact + int(np.log(n / exact) / np.log(128 / exact) * (buckets - exact) + 1e-9))


def transcribe(params: dict, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Logits of one prompt and one answer, a layer and a head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def rms(scale: np.ndarray, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def attention(a: dict, x: np.ndarray, y: np.ndarray, added: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        for head in range(SIZES["num_heads"]):
            scores = (x @ a["query"][:, head]) @ (y @ a["key"][:, head]).T + added[head]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out += weights / weights.sum(-1, keepdims=True) @ (y @ a["value"][:, head]) @ a["out"][head]
        return out

    def stack(s: dict, x: np.ndarray, source: np.ndarray | None) -> np.ndarray:
        two_sided, n = source is None, len(x)
        buckets = [[bucket(i - j, two_sided) for j in range(n)] for i in range(n)]
        added = s["relative_bias"][:, np.array(buckets)]
        if not two_sided:
            added = np.where(np.tril(np.ones((n, n), bool)), added, -np.inf)
        for i in range(len(s["layers"]["attention"]["query"])):
            layer = jax.tree.map(lambda a, i=i: a[i], s["layers"])
            y = rms(layer["attention_norm"]["scale"], x)
            x = x + attention(layer["attention"], y, y, added)
            if source is not None:
                y = rms(layer["cross_norm"]["scale"], x)
                x = x + attention(layer["cross"], y, source, np.zeros((SIZES["num_heads"], 1, 1)))
            y = rms(layer["ffn_norm"]["scale"], x)
            g, f = y @ layer["ffn"]["gate"], layer["ffn"]
            g = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
            x = x + (g * (y @ f["inner"])) @ f["outer"]
        return rms(s["final_norm"]["scale"], x)

    source = stack(p["encoder"], p["table"][prompt], None)
    return stack(p["decoder"], p["table"][answer], source) @ p["head"].T


def test_equals_the_transcription() -> None:
    b = batch()
    logits = np.asarray(_hidden()(params_of(), b)) @ np.asarray(params_of()["head"]).T
    for row in range(0, B, 3):
        prompt, answer = np.asarray(b["history_ids"][row, : 1 + row % PROMPT]), np.asarray(b["decoder_ids"][row])
        np.testing.assert_allclose(logits[row], transcribe(params_of(), prompt, answer), rtol=1e-4, atol=1e-4)


def test_packed_rows_equal_rows_of_their_own() -> None:
    prompts, answers = [[5, 6, 7, 8], [9], [10, 11]], [[0, 20], [0, 21, 22], [0]]
    packed = _hidden()(params_of(), rows_of([prompts], [answers], answer=6))[0]
    alone = _hidden()(params_of(), rows_of([[p] for p in prompts], [[a] for a in answers]))
    want = jnp.concatenate([alone[i, : len(a)] for i, a in enumerate(answers)])
    np.testing.assert_allclose(packed, want, rtol=1e-5, atol=1e-5)


def test_later_tokens_and_other_prompts_change_nothing() -> None:
    b = batch()
    other = {**b, "decoder_ids": b["decoder_ids"].at[:, 3].add(1), "history_ids": b["history_ids"].at[0].add(1)}
    got, want = _hidden()(params_of(), other), _hidden()(params_of(), b)
    np.testing.assert_array_equal(got[1:, :3], want[1:, :3])
    assert np.abs(got[0, :3] - want[0, :3]).max() > 1e-3 and np.abs(got[1:, 3] - want[1:, 3]).max() > 1e-3


@pytest.mark.parametrize("preset", [pytest.param("fsdp", marks=pytest.mark.heavy), "fsdp_model"])
def test_sharded_equals_one_device(preset: str) -> None:
    """Loss and gradients, the start token's row included."""
    b, model = batch(), model_of()

    def loss(params, batch):
        out = model.apply(params, batch, train=False, key=None)
        return (out["hidden"] @ out["table"].T)[:, :, 2:40].mean()

    want = jax.jit(jax.value_and_grad(loss))(params_of(), b)
    assert np.abs(want[1]["table"][0]).max() > 0
    mesh = make_mesh(MeshConfig(shape="data=8" if preset == "fsdp" else "data=4,model=2", preset=preset))
    with mesh.activate():
        placed = jax.tree.map(jax.device_put, params_of(), mesh.shardings(model.axes))
        got = jax.jit(jax.value_and_grad(loss))(placed, mesh.put_batch(jax.tree.map(np.asarray, b)))
    jax.tree.map(lambda a, c: np.testing.assert_allclose(a, c, rtol=2e-4, atol=2e-5), got, want)


def test_one_token_at_a_time_equals_the_whole_answer() -> None:
    b, model = batch(), model_of()
    answers = np.random.default_rng(1).integers(2, V, (B, M, 4)).astype(np.int32)
    prompts = {k: v for k, v in b.items() if not k.startswith("decoder_")}

    @jax.jit
    def run(params, batch, answers):
        bound = model.bind(params)
        first, memory = bound.prefill(batch)
        suffix, outs = bound.start(memory, M, 4), [jnp.broadcast_to(first[:, None], (B, M, 16))]
        for step in range(4):
            out, suffix = bound.extend(memory, suffix, answers[:, :, step], step)
            outs.append(out)
        return jnp.stack(outs, axis=2), memory.table

    got, table = run(params_of(), prompts, answers)
    whole = {k: jnp.repeat(v, M, axis=0) for k, v in b.items()}
    whole["decoder_ids"] = jnp.concatenate([jnp.zeros((B * M, 1), jnp.int32), answers.reshape(-1, 4)], axis=1)
    np.testing.assert_allclose(got.reshape(B * M, 5, 16), _hidden()(params_of(), whole), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(table, params_of()["head"])


def test_the_start_of_an_answer_to_packed_prompts() -> None:
    """`query_at` names a slot of each prompt that is asked about, and a batch without answers asks for their start."""
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    answers = rows_of([[p] for p in prompts], [[[0]]] * 3, answer=1)
    want = _hidden()(params_of(), answers)[:, 0]
    packed = rows_of([prompts], [[]])
    packed = {k: v for k, v in packed.items() if not k.startswith("decoder_")}
    packed["query_at"] = jnp.asarray([[3, 4, 6, -1]])
    out = model_of().apply(params_of(), packed, train=False, key=None)
    np.testing.assert_allclose(out["query"][0, :3], want, rtol=1e-5, atol=1e-5)
    alone = {k: v for k, v in answers.items() if not k.startswith("decoder_")}
    out = model_of().apply(params_of(), alone, train=False, key=None)
    np.testing.assert_allclose(out["hidden"][:, 0], want, rtol=1e-5, atol=1e-5)


def test_initial_scales_are_those_of_t5() -> None:
    encoder = t5_stack(num_layers=2, width=64, num_heads=4, head_dim=32, mlp_width=256)
    decoder = dataclasses.replace(encoder, causal=True, cross=True)
    make = partial(EncoderDecoder, num_rows=512, encoder=encoder, decoder=decoder)
    params = jax.jit(Functional(make).init)(jax.random.key(0))
    layer = params["decoder"]["layers"]
    for weights, want in (
        (params["table"], 1),
        (params["head"], 64**-0.5),
        (layer["attention"]["query"], (64 * 32) ** -0.5),
        (layer["cross"]["key"], 64**-0.5),
        (layer["attention"]["out"], (4 * 32) ** -0.5),
        (layer["ffn"]["gate"], 64**-0.5),
        (layer["ffn"]["outer"], 256**-0.5),
    ):
        assert float(jnp.std(weights)) == pytest.approx(want, rel=0.04)


def test_dropout_only_in_training() -> None:
    model = model_of(dropout=0.2, attention_dropout=0.2)
    run = jax.jit(partial(model.apply, params_of(), batch(), train=True))
    one, two = (run(key=jax.random.key(i))["hidden"] for i in range(2))
    assert np.abs(one - two).max() > 1e-2
    calm = model.apply(params_of(), batch(), train=False, key=jax.random.key(0))["hidden"]
    np.testing.assert_allclose(calm, _hidden()(params_of(), batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"causal": False}, {"cross": False}, {"position": "learned"}, {"width": 32}], ids=str
)
def test_stacks_that_do_not_fit_are_config_errors(change: dict) -> None:
    decoder = dataclasses.replace(t5_stack(is_decoder=True, **SIZES), **change)
    with pytest.raises(ConfigError):
        Functional(partial(EncoderDecoder, num_rows=V, encoder=t5_stack(**SIZES), decoder=decoder))
