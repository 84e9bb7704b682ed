"""`recjax convert` with decoders: there and back, what it says, and a recipe that goes on from what was converted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from recjax import convert, convert_decoder
from recjax.bridge.decoder import FIRST_ROW, Decoder
from recjax.bridge.decoder_files import write_decoder
from recjax.core.errors import CheckpointError
from recjax.core.state import by_path
from recjax.core.warm_start import WarmStart, warm_start
from recjax.data.examples import Examples
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig
from recjax.recipe import Assembly
from recjax.tasks.cache import place_of

ENCODER = TransformerConfig(
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=24,
    position="rotary",
    norm="rms",
    ffn="swiglu",
    bias=False,
    tied_head=False,
    moe=MoeConfig(num_experts=2, top_k=1),
)


def hugging_face(out: Path, words: int, **more) -> Path:
    decoder = Decoder(words=words, encoder=dataclasses.replace(ENCODER, **more))
    draw = np.random.default_rng(0)
    params = {path: draw.normal(size=shape).astype(np.float32) for path, (_, shape) in decoder.signature().items()}
    write_decoder(out, decoder, decoder.signature(), params.__getitem__)
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def assembly(tiny_recipe) -> Assembly:
    recipe = dataclasses.replace(tiny_recipe, model=tiny_recipe.model.with_(ENCODER, 0.0))
    return Assembly(recipe, [Examples.open(place_of(recipe.mixture.tasks[0], None).path)])


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_there_and_back_by_the_command_line(tmp_path: Path, capsys) -> None:
    source = hugging_face(tmp_path / "hf", 40)
    assert convert.main([f"--source={source}", f"--out={tmp_path / 'ours'}"]) == 0
    said = capsys.readouterr().out
    for part in ("2 layers of width 16", "1 of 2 experts", "40 tokens in rows 2 to 41 of 128", "tokenizer.json"):
        assert part in said
    assert "moe.MoeConfig.num_experts = 2" in (tmp_path / "ours" / "model.gin").read_text()
    assert convert.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}"]) == 0
    assert "step 0" in capsys.readouterr().out and (tmp_path / "back" / "tokenizer.json").is_file()
    first, second = arrays(source), arrays(tmp_path / "back")
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"hf", "ours", "back"}


def test_a_run_gets_its_settings_from_a_folder_like_it(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "hf", 40)
    ours = tmp_path / "run" / "checkpoints"
    convert_decoder.to_ours(source, ours, convert.save)
    convert_decoder.shutil.rmtree(ours / convert_decoder.ORIGIN)
    with pytest.raises(CheckpointError, match="--like"):
        convert.main([f"--source={tmp_path / 'run'}", f"--out={tmp_path / 'lost'}"])
    assert convert.main([f"--source={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", f"--like={source}"]) == 0
    np.testing.assert_array_equal(arrays(source)["lm_head.weight"], arrays(tmp_path / "out")["lm_head.weight"])
    other = hugging_face(tmp_path / "other", 40, num_layers=1)
    with pytest.raises(CheckpointError, match="different: encoder/layers/attention/key"):
        convert.main([f"--source={tmp_path / 'run'}", f"--out={tmp_path / 'lost'}", f"--like={other}"])


def test_a_recipe_goes_on_from_it_and_is_written_for_hugging_face(assembly: Assembly, tmp_path: Path) -> None:
    words = assembly.vocab.num_items
    source = hugging_face(tmp_path / "hf", words + 3)  # some tokens that the tokenizer does not use
    convert_decoder.to_ours(source, tmp_path / "ours", convert.save, assembly)
    warm, taken = warm_start(WarmStart(checkpoints=str(tmp_path / "ours")), assembly.init_state().params)
    assert taken.fresh == []
    table = by_path(warm)["table"][FIRST_ROW : FIRST_ROW + words]
    np.testing.assert_array_equal(table, arrays(source)["model.embed_tokens.weight"][:words])
    decoder, tokenizer = convert_decoder.decoder_of(None, tmp_path / "ours", assembly)
    assert decoder == Decoder(words=words, encoder=ENCODER) and tokenizer == tmp_path / "ours" / "hugging_face"
    params = {path: np.asarray(x) for path, x in by_path(warm).items()}
    said = convert_decoder.to_hugging_face("a run", tmp_path / "out", decoder, decoder.signature(), params.__getitem__)
    assert "a run: " in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == words


def test_a_model_of_other_sizes_than_the_recipe_is_refused(assembly: Assembly, tmp_path: Path) -> None:
    words = assembly.vocab.num_items
    few = hugging_face(tmp_path / "few", words - 1)
    with pytest.raises(CheckpointError, match=f"a tokenizer of {words} tokens for a model of {words - 1}"):
        convert_decoder.to_ours(few, tmp_path / "ours", convert.save, assembly)
    wide = hugging_face(tmp_path / "wide", words, mlp_width=32)
    with pytest.raises(CheckpointError, match="different: encoder/layers/ffn/gate"):
        convert_decoder.to_ours(wide, tmp_path / "ours", convert.save, assembly)
    assert not (tmp_path / "ours").exists()
