"""A dense retriever: items are their titles, alike in training, evaluation and the folded model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ExamplesError
from recjax.core.module import Functional, with_facts
from recjax.core.optim import Optimizer
from recjax.core.sharding import MeshConfig
from recjax.data.features import TitleTokens
from recjax.data.pipeline import Feed
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.tokens import AtomicIds
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.bi_encoder import BiEncoder
from recjax.models.folded import fold
from recjax.nn.transformer import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search

ITEMS, ROWS, WIDTH = 128, 256, 16
TEXT = np.zeros((ITEMS, 4), np.int32)
TEXT[2:40, :3] = np.random.default_rng(0).integers(ITEMS, ROWS, (38, 3))
TEXT[2:20, 2] = 0
TEXT[21] = TEXT[20]


def model_of(**more: object) -> Functional:
    encoder = TransformerConfig(num_layers=1, width=WIDTH, num_heads=2)
    return Functional(functools.partial(BiEncoder, num_rows=ROWS, encoder=encoder, max_length=8, **more))


def params_of(model: Functional) -> dict:
    params = model.init(jax.random.key(0))
    table = jax.random.normal(jax.random.key(1), params["table"].shape)
    return with_facts({**params, "table": table}, {"item/text": jnp.asarray(TEXT)})


def batch_of(ids: np.ndarray) -> dict[str, jax.Array]:
    real = ids > 0
    positions = np.where(real, np.arange(ids.shape[1]), 0).astype(np.int32)
    found = {"history_ids": ids, "positions": positions, "segment_ids": real.astype(np.int32)}
    return {name: jnp.asarray(x) for name, x in found.items()}


@pytest.mark.parametrize("normalize", [False, True])
def test_an_item_is_what_the_encoder_makes_of_its_title_as_a_query(normalize: bool) -> None:
    """Both towers are one: the title asked as a query gives the item's own row of the table."""
    model = model_of(normalize=normalize)
    params = params_of(model)
    out = model.apply(params, batch_of(TEXT[2:40]), train=False, key=None)
    last = (TEXT[2:40] > 0).sum(1) - 1
    asked = np.asarray(out["hidden"])[np.arange(38), last]
    np.testing.assert_allclose(np.asarray(out["table"])[2:40], asked, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out["table"][20], out["table"][21])


def test_rows_without_a_title_keep_their_own() -> None:
    model = model_of()
    params = params_of(model)
    out = model.apply(params, batch_of(TEXT[2:4]), train=False, key=None)
    own = [0, 1, *range(40, ROWS)]
    np.testing.assert_array_equal(np.asarray(out["table"])[own], np.asarray(params["table"])[own])


def test_folded_equals_unfolded() -> None:
    model = model_of(normalize=True)
    params = params_of(model)
    plain, folded = fold(model, params)
    batch = batch_of(np.concatenate([TEXT[2:6, :2], [[5, 9], [30, 2], [0, 0]]]).astype(np.int32))
    got, want = (m.apply(p, batch, train=False, key=None) for m, p in ((plain, folded), (model, params)))
    scores, expected = (jnp.einsum("bld,vd->blv", o["hidden"], o["table"]) for o in (got, want))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mixture(prepare_here) -> Mixture:
    log = NextItem(data=DataDir(simulate=World(num_events=3000)))
    tasks = [log, Search(log=log)]
    for task in tasks:
        prepare_here(task)
    return Mixture(tasks=tasks)


def assembly_of(mixture: Mixture, *, mesh: str = "data=1", devices: int = 1, length: int = 6) -> Assembly:
    recipe = Recipe(
        name="two towers",
        mixture=mixture,
        feed=Feed(batch_size=8, row_length=16, history_length=8, text_length=8),
        model=functools.partial(BiEncoder, encoder=TransformerConfig(num_layers=1, width=WIDTH, num_heads=2)),
        facts=[TitleTokens(length=length)],
        spelling=AtomicIds(),
        objectives=[CatalogueSoftmax()],
        optimizer=Optimizer(kind="sgd", learning_rate=0.1),
        mesh=MeshConfig(shape=mesh, preset="fsdp_model"),
        train_steps=2,
    )
    return Assembly(recipe, ensure_prepared(mixture), jax.devices()[:devices])


def test_titles_are_spelt_as_queries_are(mixture: Mixture) -> None:
    assembly = assembly_of(mixture)
    searches = assembly.examples[1]
    text, tokens = np.asarray(assembly.facts["item/text"]), assembly.tokens
    assert text.shape == (assembly.vocab.num_rows, 6) and not text[:2].any()
    for row in range(2, 60, 7):
        title = searches.titles()[row]
        spelt = searches.text_vocab.encode(title)[:6] + tokens.text_start
        np.testing.assert_array_equal(text[row][: len(spelt)], spelt)
        assert not text[row][len(spelt) :].any()
    with pytest.raises(ExamplesError, match="text vocabulary"):
        TitleTokens()(assembly.examples[:1])


def test_sharded_training_is_training_on_one_device(mixture: Mixture) -> None:

    def outcome(mesh: str, devices: int) -> tuple[dict, float]:
        assembly = assembly_of(mixture, mesh=mesh, devices=devices, length=4)
        batches = assembly.batches()
        with assembly.mesh.activate():
            state, step, const = assembly.init_state(), assembly.train_step(), assembly.const()
            for _ in range(2):
                state, metrics = step(state, assembly.mesh.put_batch(next(batches)), const)
        return jax.device_get(state.params), float(metrics["loss"])

    (many, loss), (one, expected) = outcome("data=4,model=2", 8), outcome("data=1", 1)
    assert loss == pytest.approx(expected, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), many, one)
