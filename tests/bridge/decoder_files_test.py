"""Folders of language models: what is refused and how that is said, what comes along, how little is in memory."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recjax.bridge import decoder_files
from recjax.bridge.decoder import FIRST_ROW, Decoder
from recjax.bridge.decoder_config import as_gin, of_config, to_config
from recjax.bridge.decoder_files import read_decoder, with_rows, write_decoder
from recjax.bridge.tensors import Tensors, open_safetensors
from recjax.core import config as gin_files
from recjax.core.errors import CheckpointError
from recjax.core.flags import parse_argv
from recjax.core.state import by_path
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig
from recjax.nn.rotary import RopeScaling, rates

ENCODER = TransformerConfig(
    num_layers=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=24,
    position="rotary",
    norm="rms",
    ffn="swiglu",
    bias=False,
    tied_head=False,
    moe=MoeConfig(num_experts=4),
)
MIXTRAL = Decoder(words=40, encoder=ENCODER)
HERE = Path("there")


@functools.cache
def parameters() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {path: draw.normal(size=shape).astype(np.float32) for path, (_, shape) in MIXTRAL.signature().items()}


def write(out: Path, **more) -> Path:
    write_decoder(out, MIXTRAL, MIXTRAL.signature(), parameters().__getitem__, **more)
    return out


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_several_files_and_their_index(tmp_path: Path) -> None:
    one, many = write(tmp_path / "one"), write(tmp_path / "many", shard_bytes=6_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.stat().st_size < 8_000 for file in files)
    assert index["metadata"]["total_size"] == 4 * MIXTRAL.parameters()
    first, second = (by_path(read_decoder(folder)[1]) for folder in (one, many))
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)


def test_everything_that_differs_is_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "broken")
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    arrays["model.layers.0.input_layernorm.weight"] = np.zeros(5, np.float32)
    arrays["visual.patch.weight"] = np.zeros((2, 3), np.float32)
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_decoder(folder)
    for line in (
        "missing: model.layers.1.block_sparse_moe.experts.3.w2.weight (16, 24)",
        "unexpected: visual.patch.weight (2, 3)",
        "different: model.layers.0.input_layernorm.weight is (5,), not (16,)",
    ):
        assert line in str(error.value)


def test_settings_that_ours_cannot_have_are_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "other")
    rope = {"rope_type": "dynamic", "factor": 2.0}
    edit(folder, hidden_act="gelu", sliding_window=8, rope_parameters=rope, rope_scaling=None, num_hidden_layers=None)
    with pytest.raises(CheckpointError) as error:
        read_decoder(folder)
    for line in ("hidden_act = 'gelu'", "sliding_window = 8", "'dynamic'", "missing: num_hidden_layers"):
        assert line in str(error.value)
    edit(folder, model_type="gemma2")
    with pytest.raises(CheckpointError, match="model_type = 'gemma2'"):
        read_decoder(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm": "layer"}, "norm = 'layer', not 'rms'"),
        ({"qk_norm": True}, "moe and qk_norm"),
        ({"residual": "gated"}, "residual = 'gated'"),
    ],
)
def test_a_model_without_a_place_is_refused(change: dict, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        to_config(Decoder(words=40, encoder=dataclasses.replace(ENCODER, **change)), "float32")


def test_parameters_of_another_model_are_not_written(tmp_path: Path) -> None:
    other = Decoder(words=40, encoder=dataclasses.replace(ENCODER, num_layers=3))
    with pytest.raises(CheckpointError, match="different: encoder/layers/ffn/gate"):
        write_decoder(tmp_path / "out", other, MIXTRAL.signature(), parameters().__getitem__)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_comes_along_and_half_the_bytes_do(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "merges.txt").write_text("a b\n")
    (source / "notes.md").write_text("not part of a tokenizer")
    folder = write(tmp_path / "out", tokenizer=source, dtype=ml_dtypes.bfloat16)
    assert (folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (folder / "merges.txt").is_file() and not (folder / "notes.md").exists()
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    table = by_path(read_decoder(folder)[1])["table"][FIRST_ROW:42]
    np.testing.assert_array_equal(table, parameters()["table"][FIRST_ROW:42].astype(ml_dtypes.bfloat16))


def test_one_array_of_theirs_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, alive, most = write(tmp_path / "big"), [], [0]

    def counted(path: Path) -> Tensors:
        there = open_safetensors(path)

        def read(name: str) -> np.ndarray:
            gc.collect()
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            array = there.read(name).copy()
            alive.append(weakref.ref(array))
            return array

        return dataclasses.replace(there, read=read)

    monkeypatch.setattr(decoder_files, "open_safetensors", counted)
    gc.freeze()  # what other tests left behind is not searched again at every array
    try:
        read_decoder(folder, lambda name, shape: np.memmap(tmp_path / name.replace("/", "."), "f4", "w+", shape=shape))
    finally:
        gc.unfreeze()
    assert len(alive) > 30 and most[0] <= 1


def test_rows_for_another_vocabulary(tmp_path: Path) -> None:
    _, params = read_decoder(write(tmp_path / "out"))
    fewer = with_rows(params, MIXTRAL, 30, 128)
    for name in ("table", "head"):
        np.testing.assert_array_equal(fewer[name][FIRST_ROW:32], parameters()[name][FIRST_ROW:32])
        np.testing.assert_array_equal(fewer[name][32:], 0)
    with pytest.raises(CheckpointError, match="a tokenizer of 41 tokens for a model of 40"):
        with_rows(params, MIXTRAL, 41, 128)


SCALINGS = [
    None,
    RopeScaling(kind="linear", factor=2.0, trained_length=4096),
    RopeScaling(kind="yarn", factor=4.0, trained_length=1024, slow=2.0),
    RopeScaling(kind="llama3", factor=8.0, trained_length=1024),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "none" if s is None else s.kind)
@pytest.mark.parametrize("old", [True, False])
def test_settings_there_and_back(scaling: RopeScaling | None, old: bool, tmp_path: Path) -> None:
    """Through config.json, as old and new versions write a rope, and through a gin file."""
    encoder = dataclasses.replace(ENCODER, rope_scaling=scaling, rope_theta=5e5, max_length=4096)
    written = to_config(Decoder(words=40, encoder=encoder), "float32")
    written.pop("rope_parameters" if old else "rope_theta")
    assert of_config(written, HERE) == Decoder(words=40, encoder=encoder)
    path = tmp_path / "model.gin"
    path.write_text(as_gin(encoder))
    gin_files.parse(parse_argv([f"--gin_file={path}"]))
    assert gin_files.build("transformer.TransformerConfig") == encoder


def test_ntk_is_written_as_another_theta() -> None:
    ntk = RopeScaling(kind="ntk", factor=4.0, trained_length=1024)
    encoder = dataclasses.replace(ENCODER, rope_scaling=ntk, rope_theta=1e4)
    found = of_config(to_config(Decoder(words=40, encoder=encoder), "float32"), HERE).encoder
    assert found.rope_scaling is None
    np.testing.assert_allclose(rates(4, found.rope_theta, None), rates(4, 1e4, ntk), rtol=1e-6)
