"""Language models of Hugging Face: their files against numpy and against `transformers`, and the model that we make."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from recjax.bridge.decoder import FIRST_ROW, Decoder, pieces
from recjax.bridge.decoder_files import read_decoder, write_decoder
from recjax.core import saved
from recjax.core.state import by_path
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig
from recjax.nn.rotary import RopeScaling, rates

BLOCK = {"position": "rotary", "norm": "rms", "ffn": "swiglu", "bias": False}
SIZES = {"num_layers": 2, "width": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_width": 24}
PLAIN = TransformerConfig(**BLOCK, **SIZES, max_length=64, norm_epsilon=1e-5, tied_head=False)
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, trained_length=32)
MODELS = {
    "llama": dataclasses.replace(PLAIN, rope_scaling=LLAMA3),
    "mixtral": dataclasses.replace(PLAIN, rope_theta=1e6, moe=MoeConfig(num_experts=4, top_k=2)),
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, tied_head=True, head_dim=8, num_kv_heads=1),
}
WORDS, LENGTH = 150, 21


def decoder(name: str) -> Decoder:
    return Decoder(words=WORDS, encoder=MODELS[name])


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    """Drawn so that no layer is close to doing nothing; rows of nobody are zero, as they are when read."""
    draw, out = np.random.default_rng(0), {}
    for path, (_, shape) in decoder(name).signature().items():
        scale = 0.6 if path in ("table", "head") else 1.5 * np.prod(shape[-2:-1] or shape) ** -0.5
        out[path] = (draw.normal(size=shape) * scale + ("norm" in path)).astype(np.float32)
    for path in ("table", "head"):
        if path in out:
            out[path][:FIRST_ROW] = out[path][FIRST_ROW + WORDS :] = 0
    return out


def write(name: str, out: Path, **more) -> Path:
    write_decoder(out, decoder(name), decoder(name).signature(), parameters(name).__getitem__, **more)
    return out


def texts() -> np.ndarray:
    return np.random.default_rng(1).integers(0, WORDS, (2, LENGTH))


def our_logits(decoder: Decoder, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Of two texts packed into one row, behind some padding, for every word."""
    count, length = tokens.shape
    row = {
        "history_ids": np.concatenate([*(tokens + FIRST_ROW), np.zeros(5)]),
        "positions": np.concatenate([*(np.arange(length),) * count, np.zeros(5)]),
        "segment_ids": np.concatenate([np.repeat(1 + np.arange(count), length), np.zeros(5)]),
    }
    batch = {k: jnp.asarray(v[None], jnp.int32) for k, v in row.items()}
    run = jax.jit(functools.partial(decoder.model().apply, train=False, key=None))
    out = run(jax.tree.map(jnp.asarray, params), batch)
    logits = out["hidden"][0, : tokens.size] @ out["table"][FIRST_ROW : FIRST_ROW + decoder.words].T
    return np.asarray(logits).reshape(count, length, -1)


def transcribed(w: dict[str, np.ndarray], c: TransformerConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits of one text from the arrays of the files, by the formulas of the card and nothing of ours but the rope's
    speeds, which have a test of their own."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    speed = rates(c.head_width, c.rope_theta, c.rope_scaling).astype(np.float64)

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * scale

    def silu(x):
        return x / (1 + np.exp(-x))

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def heads(x, layer, letter):
        name = f"{layer}.self_attn.{letter}_proj"
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
        y = y.reshape(len(x), -1, c.head_width)
        norm = f"{layer}.self_attn.{letter}_norm.weight"
        return rms(y, w[norm]) if norm in w else y

    def turn(x):
        angle = np.concatenate([np.outer(np.arange(len(x)), speed)] * 2, axis=-1)[:, None]
        low, high = np.split(x, 2, axis=-1)
        return x * np.cos(angle) + np.concatenate([-high, low], axis=-1) * np.sin(angle)

    def feed_forward(x, layer):
        if c.moe is None:
            gate, up, down = (w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            return (silu(x @ gate.T) * (x @ up.T)) @ down.T
        experts = f"{layer}.block_sparse_moe"
        scores, out = x @ w[f"{experts}.gate.weight"].T, np.zeros_like(x)
        for i, row in enumerate(scores):
            chosen = np.argsort(-row)[: c.moe.top_k]
            for e, share in zip(chosen, softmax(row[chosen]), strict=True):
                w1, w2, w3 = (w[f"{experts}.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
                out[i] += share * ((silu(x[i] @ w1.T) * (x[i] @ w3.T)) @ w2.T)
        return out

    x = w["model.embed_tokens.weight"][tokens]
    later = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        y = rms(x, w[f"{layer}.input_layernorm.weight"])
        q, k, v = turn(heads(y, layer, "q")), turn(heads(y, layer, "k")), heads(y, layer, "v")
        k, v = (np.repeat(z, c.num_heads // c.kv_heads, axis=1) for z in (k, v))
        weights = softmax(np.einsum("qhk,shk->hqs", q, k) * c.head_width**-0.5 + later)
        mixed = np.einsum("hqs,shk->qhk", weights, v).reshape(len(x), -1)
        x = x + mixed @ w[f"{layer}.self_attn.o_proj.weight"].T
        x = x + feed_forward(rms(x, w[f"{layer}.post_attention_layernorm.weight"]), layer)
    return rms(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("name", MODELS)
def test_the_files_mean_what_the_formulas_say(name: str, tmp_path: Path) -> None:
    """Written, transcribed from the file, and read again by us: the same logits, packed or not."""
    folder = write(name, tmp_path / name)
    arrays = load_file(folder / "model.safetensors")
    found, params = read_decoder(folder)
    assert found == decoder(name)
    got = our_logits(found, params, texts())
    want = np.stack([transcribed(arrays, found.encoder, tokens) for tokens in texts()])
    assert want.std() > 0.5
    np.testing.assert_allclose(got, want, atol=1e-4)


HEAVY = ("llama", "qwen2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.heavy if n in HEAVY else ()) for n in MODELS])
def test_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """A folder of ours, loaded by Hugging Face's own code."""
    torch, transformers = (pytest.importorskip(module) for module in ("torch", "transformers"))
    folder = write(name, tmp_path / name, shard_bytes=8_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager").eval()
    assert type(theirs).__name__.lower().startswith(name) and theirs.dtype == torch.float32
    with torch.no_grad():
        want = theirs(torch.tensor(texts())).logits.numpy()
    got = our_logits(decoder(name), saved.nested(parameters(name)), texts())
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_model_that_transformers_wrote(tmp_path: Path) -> None:
    """Random weights of theirs, in several files, with a tied head: read by us, the same logits."""
    torch, transformers = (pytest.importorskip(module) for module in ("torch", "transformers"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.3}
    config = transformers.MistralConfig(
        **sizes, vocab_size=WORDS, num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=None
    )
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"), max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    found, params = read_decoder(tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(torch.tensor(texts())).logits.numpy()
    np.testing.assert_allclose(our_logits(found, params, texts()), want, atol=1e-4)


def test_every_parameter_has_its_place(tmp_path: Path) -> None:
    """Pieces cover our arrays once each, but for the rows of nobody."""
    for name in MODELS:
        covered = {path: np.zeros(shape, np.int32) for path, (_, shape) in decoder(name).signature().items()}
        for piece in pieces(decoder(name)):
            covered[piece.path][piece.index or ...] += 1
        for path, count in covered.items():
            want = np.ones_like(count)
            if path in ("table", "head"):
                want[:FIRST_ROW] = want[FIRST_ROW + WORDS :] = 0
            np.testing.assert_array_equal(count, want, err_msg=f"{name} {path}")


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_there_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = write(name, tmp_path / "first")
    found, params = read_decoder(first)
    for path, value in by_path(params).items():
        np.testing.assert_array_equal(value, parameters(name)[path], err_msg=path)
    second = tmp_path / "second"
    write_decoder(second, found, saved.signature(params), by_path(params).__getitem__, shard_bytes=9_000)
    arrays = load_file(first / "model.safetensors")
    again = {k: v for file in second.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(arrays) == set(again)
    for path, value in arrays.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
