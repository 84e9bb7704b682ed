"""An encoder-decoder trained by the engine, over items and words, and searched through, as any other model is."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional, with_facts
from recjax.core.optim import Optimizer
from recjax.core.sharding import MeshConfig
from recjax.data.pipeline import Feed
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.tokens import AtomicIds, Tokens
from recjax.data.vocab import FIRST_ITEM, OOV
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.seq2seq import EncoderDecoder, t5_stack
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.retrieve import spelled
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search

STACK = {"num_layers": 1, "width": 16, "num_heads": 2, "head_dim": 8, "mlp_width": 24}


@pytest.fixture(scope="module")
def recipe(prepare_here) -> Recipe:
    log = NextItem(data=DataDir(simulate=World(num_events=3000)))
    tasks = [log, Search(log=log)]
    for task in tasks:
        prepare_here(task)
    return Recipe(
        name="tiny t5",
        mixture=Mixture(tasks=tasks),
        feed=Feed(batch_size=8, row_length=32, history_length=16, answer="decoder", answer_length=8),
        model=functools.partial(EncoderDecoder, encoder=t5_stack(**STACK), decoder=t5_stack(is_decoder=True, **STACK)),
        spelling=AtomicIds(),
        objectives=[CatalogueSoftmax()],
        optimizer=Optimizer(kind="sgd", learning_rate=0.1),
        mesh=MeshConfig(shape="data=4,model=2", preset="fsdp_model"),
        train_steps=2,
    )


def test_sharded_training_is_training_on_one_device(recipe: Recipe) -> None:
    """Two steps over prompts and answers that share rows."""

    def outcome(mesh: MeshConfig, devices: int) -> tuple[dict, float]:
        here = dataclasses.replace(recipe, mesh=mesh)
        assembly = Assembly(here, ensure_prepared(here.mixture), jax.devices()[:devices])
        batches = assembly.batches()
        with assembly.mesh.activate():
            state, step, const = assembly.init_state(), assembly.train_step(), assembly.const()
            for _ in range(2):
                state, metrics = step(state, assembly.mesh.put_batch(next(batches)), const)
        assert np.isfinite(float(metrics["loss"]))
        return jax.device_get(state.params), float(metrics["loss"])

    (many, loss), (one, expected) = outcome(recipe.mesh, 8), outcome(MeshConfig(shape="data=1"), 1)
    assert loss == pytest.approx(expected, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), many, one)


def test_items_of_several_tokens_are_found_among_all(recipe: Recipe) -> None:
    """A beam as wide as the catalogue is a ranking of all items by the probability of their spelling."""
    items, sizes = 30, (5, 7)
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(35)[:items], sizes), axis=1)
    spelling = np.zeros((128, 2), np.int32)
    spelling[OOV] = OOV
    spelling[FIRST_ITEM : FIRST_ITEM + items] = codes + [FIRST_ITEM, FIRST_ITEM + sizes[0]]
    tokens = Tokens(spelling, sizes)
    model = Functional(functools.partial(recipe.model, num_rows=tokens.num_rows))
    params = jax.jit(model.init)(jax.random.key(0))
    prompt = np.array([[3, 9, 4, 8, 0, 0], [5, 7, 0, 0, 0, 0]], np.int32)
    batch = {"history_ids": prompt, "positions": np.tile(np.arange(6), (2, 1)), "segment_ids": prompt > 0}
    batch |= {"query_at": np.array([[3], [1]])}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    catalogue, facts = spelled(tokens, beams=items)
    search = jax.jit(lambda p, b: catalogue(model, p, b, items, exclude=jnp.zeros((2, 1), jnp.int32)))
    found = search(with_facts(params, facts), batch)
    rows = np.arange(FIRST_ITEM, FIRST_ITEM + items)
    every = {name: jnp.repeat(x, items, axis=0) for name, x in batch.items() if name != "query_at"}
    answer = np.stack([np.zeros(items), spelling[rows, 0]], axis=1)
    place = {"positions": np.tile([0, 1], (2 * items, 1)), "segment_ids": np.ones((2 * items, 2))}
    every |= {f"decoder_{name}": jnp.asarray(x, jnp.int32) for name, x in place.items()}
    every |= {"decoder_ids": jnp.asarray(np.tile(answer, (2, 1)), jnp.int32)}
    out = jax.jit(functools.partial(model.apply, train=False, key=None))(params, every)
    logits = np.asarray(out["hidden"] @ out["table"].T).reshape(2, items, 2, -1)
    want = np.zeros((2, items))
    for row, item in np.ndindex(2, items):
        for level in range(2):
            alike = (spelling[rows, :level] == spelling[rows[item], :level]).all(1)
            after = logits[row, item, level, np.unique(spelling[rows[alike], level])]
            want[row, item] += logits[row, item, level, spelling[rows[item], level]] - np.log(np.exp(after).sum())
    order = np.argsort(-want, axis=1)
    np.testing.assert_array_equal(found.rows, rows[order])
    np.testing.assert_allclose(found.scores, np.take_along_axis(want, order, axis=1), rtol=1e-4, atol=1e-5)
