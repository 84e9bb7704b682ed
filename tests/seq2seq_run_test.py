"""An encoder-decoder trained by the engine, over items and words, as any other model is."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from recjax.core.optim import Optimizer
from recjax.core.sharding import MeshConfig
from recjax.data.pipeline import Feed
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.tokens import AtomicIds
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.seq2seq import EncoderDecoder, t5_stack
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
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
