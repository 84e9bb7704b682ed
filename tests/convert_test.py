"""`recjax convert`: there and back through the command line, and a language model that learns a recipe's items."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from recjax import convert
from recjax.bridge.t5 import Sizes
from recjax.bridge.t5_files import write_t5
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.saved import nested
from recjax.core.state import by_path
from recjax.core.warm_start import WarmStart, warm_start
from recjax.data.examples import Examples
from recjax.data.pipeline import Feed
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.tokens import AtomicIds
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.seq2seq import EncoderDecoder, t5_stack
from recjax.recipe import Assembly, Recipe
from recjax.tasks.cache import place_of
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search

STACK = {"width": 16, "num_heads": 2, "head_dim": 8, "mlp_width": 24}
SIZES = Sizes(rows=1024, encoder_layers=1, decoder_layers=2, **STACK)


@functools.cache
def parameters() -> dict[str, np.ndarray]:
    params = jax.jit(SIZES.model().init)(jax.random.key(0))
    return {path: np.asarray(x) for path, x in by_path(params).items()}


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    write_t5(tmp_path / "hf", SIZES.signature(), parameters().__getitem__)
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def assembly(prepare_here) -> Assembly:
    log = NextItem(data=DataDir(simulate=World(num_events=3000)))
    tasks = [log, Search(log=log)]
    for task in tasks:
        prepare_here(task)
    model = functools.partial(
        EncoderDecoder,
        encoder=t5_stack(num_layers=1, **STACK),
        decoder=t5_stack(num_layers=2, is_decoder=True, **STACK),
    )
    recipe = Recipe(
        name="tiny t5",
        mixture=Mixture(tasks=tasks),
        feed=Feed(batch_size=8, row_length=32, history_length=16, answer="decoder", answer_length=8),
        model=model,
        spelling=AtomicIds(),
        objectives=[CatalogueSoftmax()],
        train_steps=2,
    )
    return Assembly(recipe, [Examples.open(place_of(task, None).path) for task in tasks])


def test_there_and_back_by_the_command_line(hugging_face: Path, tmp_path: Path, capsys) -> None:
    assert convert.main([f"--source={hugging_face}", f"--out={tmp_path / 'ours'}"]) == 0
    assert convert.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}"]) == 0
    assert "step 0" in capsys.readouterr().out
    first, second = (load_file(path / "model.safetensors") for path in (hugging_face, tmp_path / "back"))
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    with pytest.raises(CheckpointError, match="will not overwrite"):
        convert.main([f"--source={hugging_face}", f"--out={tmp_path / 'back'}"])


def test_a_language_model_gets_rows_for_items_and_is_trained_on(assembly: Assembly, tmp_path: Path) -> None:
    """Its words keep their vectors in the rows of the recipe, and a warm start takes all of it."""
    tokens = assembly.tokens
    assert tokens is not None and tokens.text_size <= SIZES.rows
    params = convert.for_tokens(nested(parameters()), assembly, by_title=True)
    for name in ("table", "head"):
        text = params[name][tokens.text_start : tokens.text_start + tokens.text_size]
        np.testing.assert_array_equal(text, parameters()[name][: tokens.text_size])
    title = next(i for i, t in enumerate(assembly.examples[0].titles()) if t)
    words = assembly.examples[1].text_vocab.encode(assembly.examples[0].titles()[title])
    np.testing.assert_allclose(params["head"][title], parameters()["head"][words].mean(0), rtol=1e-4, atol=1e-6)
    convert.save(tmp_path / "ours", params, vocabulary=assembly.vocabulary_hash)
    state = assembly.init_state()
    warm, taken = warm_start(WarmStart(checkpoints=str(tmp_path / "ours")), state.params)
    assert taken.fresh == []
    np.testing.assert_array_equal(warm["table"], params["table"])


def test_what_does_not_fit_the_recipe_is_refused(assembly: Assembly, tiny_recipe, recjax_cache: Path) -> None:
    params = parameters()
    wide = {name: np.repeat(x, 2, axis=-1) if name in ("table", "head") else x for name, x in params.items()}
    with pytest.raises(CheckpointError, match="different: head"):
        convert.for_tokens(nested(wide), assembly)
    plain = Assembly(tiny_recipe, [Examples.open(place_of(tiny_recipe.mixture.tasks[0], None).path)])
    with pytest.raises(ConfigError, match="this recipe has none"):
        convert.for_tokens(nested(params), plain)
