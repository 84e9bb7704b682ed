"""Tasks that a model is evaluated on and never trained on: they change nothing of the training."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.sharding import MeshConfig
from recjax.data.pipeline import Feed
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.tokens import AtomicIds
from recjax.evaluate import evaluate_run
from recjax.evaluation import Evaluation
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.train import train
from recjax.trained import load

WORLD = DataDir(simulate=World(num_events=3000))
LOG = NextItem(data=WORLD)
AGAIN, SEARCH = NextItem(data=WORLD, name="again"), Search(log=LOG)


def recipe_of(**tasks: object) -> Recipe:
    return Recipe(
        name="tiny",
        mixture=Mixture(**tasks),
        feed=Feed(batch_size=8, row_length=32, history_length=16),
        model=functools.partial(
            Sequence, encoder=TransformerConfig(num_layers=1, width=16, num_heads=2), max_length=32
        ),
        spelling=AtomicIds(),
        objectives=[CatalogueSoftmax()],
        evaluation=Evaluation(k=(5, 10), baselines=("popularity",), bootstrap_samples=20),
        mesh=MeshConfig(shape="data=-1"),
        train_steps=2,
    )


@pytest.fixture(scope="module", autouse=True)
def prepared(prepare_here) -> None:
    for task in (LOG, AGAIN, SEARCH):
        prepare_here(task)


def test_training_is_as_without_them() -> None:
    one, both = (
        Assembly(r, ensure_prepared(r.mixture))
        for r in (recipe_of(tasks=[LOG]), recipe_of(tasks=[LOG], unseen=[AGAIN]))
    )
    assert len(both.examples) == 1 and len(both.evaluated) == 2
    ours, theirs = one.batches(), both.batches()
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, next(ours), next(theirs))
    ours.close()
    theirs.close()
    jax.tree.map(np.testing.assert_array_equal, one.const(), both.const())


def test_they_are_evaluated_when_training_is_done(tmp_path: Path) -> None:
    recipe = recipe_of(tasks=[LOG], unseen=[SEARCH])
    outcome = train(recipe, tmp_path)
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture))
    params = load(recipe, tmp_path).params
    alone, unseen = (assembly.evaluator("valid", at)(params).values["ndcg@10"] for at in (0, 1))
    assert outcome.best == pytest.approx(alone) and alone != unseen  # no choice is made by it
    found = evaluate_run(recipe, tmp_path)
    assert list(found) == ["next_item", "search"]
    for name, result in found.items():
        assert (tmp_path / "test" / name / "metrics.json").exists()
        assert result.protocol["task"] == name


def test_a_task_is_either_trained_or_unseen() -> None:
    with pytest.raises(ConfigError, match="tasks named"):
        Mixture(tasks=[LOG, SEARCH], unseen=[SEARCH])
