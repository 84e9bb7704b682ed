"""Sentence encoders: a numpy transcription of BERT, Hugging Face's on random weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from recjax.bridge.bert import read_bert
from recjax.core.errors import CheckpointError

CONFIG = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
TOKENS = np.random.default_rng(3).integers(1, 60, (3, 12)) * (np.arange(12) < np.array([[12], [5], [1]]))


def tensors(prefix: str = "") -> dict[str, np.ndarray]:
    draw, d, f = np.random.default_rng(0), CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (60, d),
        "embeddings.position_embeddings.weight": (20, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        for name, (out, into) in {
            "attention.self.query": (d, d),
            "attention.self.key": (d, d),
            "attention.self.value": (d, d),
            "attention.output.dense": (d, d),
            "intermediate.dense": (f, d),
            "output.dense": (d, f),
        }.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": (out, into), f"encoder.layer.{i}.{name}.bias": (out,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{name}.{part}": (d,) for part in ("weight", "bias")}
    return {prefix + n: draw.normal(scale=0.5, size=s).astype(np.float32) for n, s in shapes.items()}


def folder(path: Path, *, prefix: str = "", config: dict[str, Any] | None = None, **files: Any) -> Path:
    (path / "1_Pooling").mkdir(parents=True)
    save_file(tensors(prefix), path / "model.safetensors")
    for name, content in {"config.json": CONFIG | (config or {}), **files}.items():
        (path / name).write_text(json.dumps(content))
    return path


def vectors(path: Path) -> np.ndarray:
    model, params = read_bert(path)
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(model.apply(params, {"tokens": jnp.asarray(TOKENS, jnp.int32)}, train=False, key=None)["hidden"])


def transcribe(tokens: np.ndarray) -> np.ndarray:
    """The outputs of BERT for one text, a head at a time."""
    t, heads = {n: x.astype(np.float64) for n, x in tensors().items()}, CONFIG["num_attention_heads"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    words, places, kinds = (t[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = norm(words[tokens] + places[: len(tokens)] + kinds[0], "embeddings.LayerNorm")
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (np.split(dense(x, f"{layer}.attention.self.{n}"), heads, -1) for n in ("query", "key", "value"))
        mixed = []
        for head in range(heads):
            w = np.exp(q[head] @ k[head].T / np.sqrt(q[head].shape[-1]))
            mixed.append(w / w.sum(-1, keepdims=True) @ v[head])
        y = dense(np.concatenate(mixed, -1), f"{layer}.attention.output.dense")
        x = norm(x + y, f"{layer}.attention.output.LayerNorm")
        y = dense(x, f"{layer}.intermediate.dense")
        y = dense(y * 0.5 * (1 + erf(y / np.sqrt(2))), f"{layer}.output.dense")
        x = norm(x + y, f"{layer}.output.LayerNorm")
    return x


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_equals_the_transcription(tmp_path: Path, pool: str) -> None:
    """Every text by itself: padding changes nothing."""
    mode = "pooling_mode_mean_tokens" if pool == "mean" else "pooling_mode_cls_token"
    path = folder(tmp_path / "m", prefix="bert.", **{"1_Pooling/config.json": {mode: True, "embedding_dimension": 16}})
    outputs = [transcribe(row[row > 0]) for row in TOKENS]
    want = [x.mean(0) if pool == "mean" else x[0] for x in outputs]
    np.testing.assert_allclose(vectors(path), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_equals_hugging_face(tmp_path: Path) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    path = folder(tmp_path / "m", **{"modules.json": [{"type": "sentence_transformers.models.Normalize"}]})
    theirs = transformers.BertModel.from_pretrained(path, add_pooling_layer=False).eval()
    mask = torch.tensor((TOKENS > 0).astype(np.int64))
    with torch.no_grad():
        hidden = theirs(input_ids=torch.tensor(TOKENS), attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        want = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    np.testing.assert_allclose(vectors(path), want, rtol=1e-4, atol=1e-5)


def test_texts_are_cut_where_sentence_transformers_cuts_them(tmp_path: Path) -> None:
    _, params = read_bert(folder(tmp_path / "m", **{"sentence_bert_config.json": {"max_seq_length": 15}}))
    assert params["position"].shape == (15, 16)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "roberta"}, "model_type = 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"hidden_size": None}, "missing: hidden_size"),
        ({"num_hidden_layers": 3}, "missing: encoder.layer.2"),
        ({"intermediate_size": 32}, "different: encoder.layer.0.intermediate"),
    ],
    ids=lambda v: str(v),
)
def test_another_model_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match="another model") as error:
        read_bert(folder(tmp_path / "m", config=config))
    assert said in str(error.value)


def test_what_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    save_file(load_file(path / "model.safetensors") | {"adapter": np.zeros(2, np.float32)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: adapter"):
        read_bert(path)
