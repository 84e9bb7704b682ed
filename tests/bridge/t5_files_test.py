"""T5 1.1 from and to files: round trips bit for bit, T5X as its library lays it down, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import serialization
from safetensors.numpy import load_file, save_file

from recjax.bridge.t5 import Sizes, pieces
from recjax.bridge.t5_files import read_t5, write_t5
from recjax.bridge.tensors import open_safetensors
from recjax.core import saved
from recjax.core.errors import CheckpointError
from recjax.core.state import by_path

SIZES = Sizes(rows=64, width=16, num_heads=4, head_dim=6, mlp_width=24, encoder_layers=2, decoder_layers=3)


@functools.cache
def parameters() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        path: draw.normal(scale=0.3, size=shape).astype(np.float32) for path, (_, shape) in SIZES.signature().items()
    }


def written(out: Path, **more: Any) -> Path:
    assert write_t5(out, SIZES.signature(), parameters().__getitem__, **more) == SIZES
    return out


def same(found: dict[str, Any], wanted: dict[str, np.ndarray]) -> None:
    found = by_path(found)
    assert set(found) == set(wanted)
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_there_and_back_bit_for_bit(tmp_path: Path) -> None:
    one = written(tmp_path / "one")
    sizes, params = read_t5(one)
    assert sizes == SIZES
    same(params, parameters())
    write_t5(tmp_path / "two", saved.signature(params), by_path(params).__getitem__)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(first) == {part.name for part in pieces(SIZES, "hf")} and "lm_head.weight" in first
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


def test_several_files_and_another_dtype(tmp_path: Path) -> None:
    """An index names the files; bfloat16 becomes float32 and goes back unharmed."""
    path = written(tmp_path / "low", dtype=ml_dtypes.bfloat16, shard_bytes=4_000)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].startswith("model-00001-of-")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    _, params = read_t5(path)
    same(params, {p: x.astype(ml_dtypes.bfloat16).astype(np.float32) for p, x in parameters().items()})
    write_t5(tmp_path / "back", saved.signature(params), by_path(params).__getitem__, dtype=ml_dtypes.bfloat16)
    there, back = open_safetensors(path), open_safetensors(tmp_path / "back")
    for name in there.shapes:
        assert there.read(name).tobytes() == back.read(name).tobytes()


def test_a_tied_head_becomes_one_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "tied")
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    sizes, params = read_t5(path)
    assert sizes == dataclasses.replace(SIZES, is_tied=True)
    same(params, {**parameters(), "head": parameters()["table"]})


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_reads_what_is_written(tmp_path: Path) -> None:
    """With the head untied, unscaled, and the logits of our model."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(written(tmp_path / "out")).eval()
    draw = np.random.default_rng(0)
    prompt, answer = draw.integers(1, SIZES.rows, (2, 7)), draw.integers(0, SIZES.rows, (2, 5))
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(prompt), decoder_input_ids=torch.tensor(answer)).logits.numpy()
    batch = {"history_ids": prompt, "decoder_ids": answer}
    for prefix, ids in (("", prompt), ("decoder_", answer)):
        batch |= {f"{prefix}positions": np.tile(np.arange(ids.shape[1]), (2, 1)), f"{prefix}segment_ids": ids * 0 + 1}
    params = jax.tree.map(jax.numpy.asarray, saved.nested(parameters()))
    batch = {name: jax.numpy.asarray(x, np.int32) for name, x in batch.items()}
    out = SIZES.model().apply(params, batch, train=False, key=None)
    np.testing.assert_allclose(out["hidden"] @ out["table"].T, want, rtol=1e-4, atol=1e-4)


def lay_down_t5x(folder: Path, *, bucket: bool) -> None:
    """A checkpoint as `t5x.checkpoints` writes it: matrices in TensorStore, vectors inside the msgpack file.

    With `bucket` the specifications are those of a checkpoint written to a bucket and copied from there.
    """
    target: dict[str, Any] = {}
    for part in pieces(SIZES, "t5x"):
        value = parameters()[part.path]
        value = part.write(value if part.layer is None else value[part.layer])
        if value.ndim > 1:
            name = f"target.{part.name.replace('/', '.')}"
            metadata = {"compressor": {"id": "gzip"}, "shape": list(value.shape), "chunks": [8, 8]}
            spec = {"driver": "zarr", "dtype": "float32", "metadata": metadata}
            store = {"driver": "file", "path": str(folder / name)}
            tensorstore.open({**spec, "kvstore": store}, create=True).result().write(value).result()
            if bucket:
                value = {**spec, "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": f"{name}/"}
            else:
                value = tensorstore.Spec({**spec, "kvstore": {"driver": "file", "path": name}}).to_json()
        node, *rest = target, *part.name.split("/")
        for word in rest[:-1]:
            node = node.setdefault(word, {})
        node[rest[-1]] = value
    state = {"step": np.int32(7), "param_states": {"encoder": {"relpos_bias": None}}}
    contents = {"version": 3, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


@pytest.mark.parametrize("bucket", [False, True])
def test_a_checkpoint_of_t5x(tmp_path: Path, bucket: bool) -> None:
    lay_down_t5x(tmp_path, bucket=bucket)
    sizes, params = read_t5(tmp_path)
    assert sizes == SIZES
    same(params, parameters())


def test_damaged_t5x_is_one_message(tmp_path: Path) -> None:
    lay_down_t5x(tmp_path, bucket=False)
    (tmp_path / "target.decoder.logits_dense.kernel" / ".zarray").unlink()
    with pytest.raises(CheckpointError, match="cannot read decoder/logits_dense/kernel"):
        read_t5(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"no msgpack")
    with pytest.raises(CheckpointError, match="cannot read this as a T5X checkpoint"):
        read_t5(tmp_path)


def test_another_model_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    path = written(tmp_path / "hf")
    config = json.loads((path / "config.json").read_text())
    other = {**config, "feed_forward_proj": "relu", "tie_word_embeddings": True, "model_type": "bart"}
    (path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError) as error:
        read_t5(path)
    for word in ("model_type = 'bart'", "feed_forward_proj = 'relu'", "outputs are scaled"):
        assert word in str(error.value)
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"] = np.zeros((3, 3), np.float32)
    tensors["adapter.weight"] = np.zeros(2, np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_t5(path)
    for word in (
        "missing: encoder.final_layer_norm.weight",
        "different: decoder.block.1",
        "unexpected: adapter.weight",
    ):
        assert word in str(error.value)


def test_what_is_not_t5_is_not_written(tmp_path: Path) -> None:
    signature = {**SIZES.signature(), "position": ("float32", (9, 16))}
    with pytest.raises(CheckpointError, match="position"):
        write_t5(tmp_path / "out", signature, parameters().__getitem__)
    with pytest.raises(CheckpointError, match="no encoder and decoder"):
        write_t5(tmp_path / "out", {"table": ("float32", (9, 16))}, parameters().__getitem__)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", ["", "config.json"])
def test_an_incomplete_folder_is_one_message(tmp_path: Path, left: str) -> None:
    path = written(tmp_path / "hf")
    for file in path.iterdir():
        if file.name != left:
            file.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing" if left else "no checkpoint of T5"):
        read_t5(path)
