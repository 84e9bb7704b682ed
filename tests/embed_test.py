"""`recjax embed`: vectors of items by their titles, written where recipes look for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
import tokenizers
from safetensors.numpy import save_file

from recjax import embed
from recjax.bridge.bert import read_bert
from recjax.core.errors import CheckpointError, DataError
from recjax.data.sources import DataDir

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "quiet", "river", "of", "stone", "loud", "##er"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
}
TITLES = ["The quiet river", "", "Louder stone", "the QUIET river", None, "of the river of the stone of the river"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT of random weights, without its tokenizer."""
    path, draw = tmp_path / "bert", np.random.default_rng(0)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (11, 8),
        "embeddings.position_embeddings.weight": (6, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
    }
    dense = {f"attention.self.{n}": (8, 8) for n in ("query", "key", "value")} | {"attention.output.dense": (8, 8)}
    for name, (out, into) in (dense | {"intermediate.dense": (12, 8), "output.dense": (8, 12)}).items():
        shapes |= {f"encoder.layer.0.{name}.weight": (out, into), f"encoder.layer.0.{name}.bias": (out,)}
    for name in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"):
        shapes |= {f"{name}.LayerNorm.{part}": (8,) for part in ("weight", "bias")}
    save_file({n: draw.normal(size=s).astype(np.float32) for n, s in shapes.items()}, path / "model.safetensors")
    return path


@pytest.fixture
def tokenizer(encoder: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(encoder / "tokenizer.json"))
    return encoder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    ids = [f"i{n}" for n in range(len(TITLES))]
    log: dict[str, Any] = {"user_id": ["u"] * len(ids), "item_id": ids, "timestamp": list(range(len(ids)))}
    pl.DataFrame(log).write_parquet(path / "interactions.parquet")
    pl.DataFrame({"item_id": ids, "title": TITLES}).write_parquet(path / "items.parquet")
    return path


def test_items_get_the_vectors_of_their_titles(tokenizer: Path, data: Path, capsys) -> None:
    """Cut to what the encoder reads, alike for alike titles, and found again by whoever reads the directory."""
    flags = [f"--model={tokenizer}", f"--data={data}", "--name=mini", "--batch=2"]
    assert embed.main(flags) == 0
    found, ids = DataDir(path=str(data)).load().vectors["mini"]
    assert ids.tolist() == ["i0", "i2", "i3", "i5"] and found.shape == (4, 8) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], found[2])
    model, params = read_bert(tokenizer)
    tokens = np.array([[2, 4, 5, 6, 3, 0], [2, 9, 10, 8, 3, 0], [2, 7, 4, 6, 7, 3]], np.int32)
    batch = {"tokens": jax.numpy.asarray(tokens)}
    want = model.apply(jax.tree.map(jax.numpy.asarray, params), batch, train=False, key=None)["hidden"]
    np.testing.assert_allclose(found[[0, 1, 3]], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="will not overwrite"):
        embed.main(flags)


def test_mistakes_are_one_message(encoder: Path, data: Path) -> None:
    with pytest.raises(DataError, match="no column brand"):
        embed.main([f"--model={encoder}", f"--data={data}", "--name=x", "--text=title,brand"])
    with pytest.raises(CheckpointError, match="tokeniz"):
        embed.main([f"--model={encoder}", f"--data={data}", "--name=x"])
    (data / "items.parquet").unlink()
    with pytest.raises(DataError, match="no text"):
        embed.main([f"--model={encoder}", f"--data={data}", "--name=x"])
    assert not (data / "vectors").exists()
