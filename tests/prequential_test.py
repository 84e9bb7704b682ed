"""Labels of a teacher that goes on learning: by whom each row is labelled, and that nobody labels what it has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recjax import command
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, recipe_files
from recjax.data.batch import Batch
from recjax.data.examples import Examples
from recjax.data.label_store import LabelStore
from recjax.data.rows_feed import RowReader
from recjax.infer import infer, infer_run
from recjax.prequential import progressive
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.recipe import Recipe
from recjax.tasks.cache import place_of
from recjax.train import train
from recjax.trained import load

SMALL = (
    "TRAIN_STEPS=6",
    "BATCH_SIZE=32",
    "recipe.Recipe.log_every=1",
    "rated_world.RatedWorld.rows=400",
    "rated_world.RatedWorld.users=30",
    "rated_world.RatedWorld.items=30",
    "trunk/tower.TowerConfig.widths=(8,)",
    "tower.TowerConfig.widths=(4,)",
    "checkpoint.Checkpoints.every=2",
)


def recipe_of(*more: str) -> Recipe:
    [file] = recipe_files("aux_distill_stream/1")
    return command.load(Flags(gin_files=(str(file),), bindings=(*SMALL, *more)))[0]


@pytest.fixture(scope="module")
def workdir(prepare_here: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe, place = recipe_of(), tmp_path_factory.mktemp("teacher")
    prepare_here(recipe.mixture.tasks[0])
    train(recipe, place)
    return place


def test_a_row_is_labelled_by_the_newest_that_was_not_trained_on_it(workdir: Path, tmp_path: Path) -> None:
    recipe = recipe_of()
    out = infer_run(load(recipe, workdir), kind="row_labels_ahead", out=tmp_path / "store")
    examples = Examples.open(place_of(recipe.mixture.tasks[0]).path)
    found, first = (LabelStore(path=str(out), version=v).read(examples) for v in (None, "first"))
    row = np.arange(examples.count("train"))
    trained_on = row // 32 + 1  # a checkpoint of this step or a later one has seen the row
    np.testing.assert_array_equal(found.version, np.where(row < 64, -1, np.minimum((trained_on - 1) // 2 * 2, 6)))
    assert (found.version < trained_on).all() and (row >= 192).any()
    np.testing.assert_array_equal(first.version, np.where(row < 64, -1, 2))
    for step in (2, 4, 6):
        run = load(recipe, workdir, checkpoint=str(step))
        config = RankerEvaluation(batch_size=64)
        said = RankerEvaluator(examples, split="train", config=config, model=run.assembly.model).scores(run.params)
        mine = found.version == step
        np.testing.assert_array_equal(found.values["like"][mine], said["like"][mine].astype(np.float16))


def test_a_day_is_judged_by_the_model_that_had_not_seen_it(workdir: Path) -> None:
    recipe = recipe_of()
    table = progressive(load(recipe, workdir))
    reader = RowReader(Examples.open(place_of(recipe.mixture.tasks[0]).path), "train")
    label, cuts = reader.column("labels")[:, 0], [64, 128, 192, len(reader)]
    assert [row[:3] for row in table.rows] == [
        [str(day + 1), str(step), str(int((label[a:b] >= 0).sum()))]
        for day, (step, a, b) in enumerate(zip((2, 4, 6), cuts, cuts[1:], strict=False))
    ]
    said = []
    for step in (2, 4, 6):
        run = load(recipe, workdir, checkpoint=str(step))
        z = np.asarray(run.assembly.model.apply(run.params, whole(reader), train=False, key=None)["logit/click"])
        said.append(1 / (1 + np.exp(-z.astype(np.float64))))
    at = {name: place for place, name in enumerate(table.header)}
    for day, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        mine = np.arange(a, b)[label[a:b] >= 0]
        for model, p in (("updated", said[day]), ("as on day 1", said[0])):
            loss = -np.where(label[mine] > 0.5, np.log(p[mine]), np.log(1 - p[mine])).mean()
            assert table.rows[day][at[f"log_loss, {model}"]] == f"{loss:.4f}".lstrip("0")
    assert table.rows[0][3:7] == table.rows[0][7:]  # on its first day it is that of the first day


def whole(reader: RowReader) -> Batch:
    """The fields of all rows."""
    return {name: x for name, x in reader.read(np.arange(len(reader))).items() if name.startswith("field/")}


def test_only_one_pass_in_order_of_time_can_be_labelled_ahead(workdir: Path, tmp_path: Path) -> None:
    for more in ("rows_feed.RowsFeed.order='shuffled'", "TRAIN_STEPS=60"):
        with pytest.raises(ConfigError, match="in order of time"):
            infer_run(load(recipe_of(more), workdir), kind="row_labels_ahead", out=tmp_path / "store")
    run = load(recipe_of(), workdir)
    with pytest.raises(ConfigError, match="cannot infer"):
        kind, examples = "row_labels_ahead", run.assembly.examples[0]
        infer(run.assembly.model, run.params, examples, kind=kind, out=tmp_path / "store", history_length=1)
