"""Sets of plain categories: the same rows from CSV, libsvm-like text and the simulated world, trained by a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from polars.testing import assert_frame_equal

from recjax import command
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, recipe_files
from recjax.core.module import Functional
from recjax.data.category_world import CategoryWorld
from recjax.data.examples import Examples
from recjax.data.fields import FieldShape
from recjax.data.rows_feed import RowReader
from recjax.evaluate import evaluate_run
from recjax.export import export_run
from recjax.losses.table_norm import TableNorm
from recjax.metrics.auc import auc
from recjax.models.ranker import Ranker
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.interaction import Flat
from recjax.recipe import Recipe
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_request import RankQuestion
from recjax.tasks.cache import place_of
from recjax.tasks.work import Work
from recjax.train import train
from recjax.trained import load

NAMES = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
WORLD = CategoryWorld(names=NAMES, sizes=(60, 90, 7, 7, 2, 3, 2, 9, 20, 30), rows=6000, noise=0.3)
LIBSVM = tuple(f"field_{k}" for k in range(len(NAMES)))


def recipe(stage: int, folder: Path, *more: str, fields: tuple[str, ...] = NAMES) -> Recipe:
    bindings = (f"DATA_DIR={str(folder)!r}", f"FIELDS={fields!r}", *more)
    return command.load(Flags(gin_files=(str(recipe_files("frappe")[stage]),), bindings=bindings))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The rows as CSV files of splits, and as libsvm-like text with labels of -1 and 1."""
    root = tmp_path_factory.mktemp("frappe")
    csv, libsvm = root / "csv", root / "libsvm"
    for folder in (csv, libsvm):
        folder.mkdir()
    for (split,), rows in WORLD.frame()[0].partition_by("split", as_dict=True).items():
        rows = rows.drop("split")
        rows.write_csv(csv / f"{split}.csv")
        lines = [" ".join([str(2 * label - 1), *(f"{v}:1" for v in values)]) for label, *values in rows.iter_rows()]
        (libsvm / f"{split}.libsvm").write_text("\n".join(lines) + "\n")
    return csv, libsvm


def matrix(work: Work, name: str, split: str) -> np.ndarray:
    found = work.raw[split][name]
    return found.values.reshape(len(found), -1)


def test_csv_and_libsvm_are_the_same_rows(folders: tuple[Path, Path]) -> None:
    csv = recipe(0, folders[0]).mixture.tasks[0].work()
    libsvm = recipe(0, folders[1], fields=LIBSVM).mixture.tasks[0].work()
    for split in ("train", "valid", "test"):
        for name in ("codes", "labels"):
            np.testing.assert_array_equal(matrix(csv, name, split), matrix(libsvm, name, split), err_msg=name)
    sizes = [len(csv.raw[split]["labels"]) for split in ("train", "valid", "test")]
    assert sizes == WORLD.frame()[0].group_by("split").len().sort("len", descending=True)["len"].to_list()
    assert csv.facts["table_rows"] == libsvm.facts["table_rows"] and csv.facts["grouped_by"] == "user"


@pytest.mark.parametrize("stage", [0, 1], ids=["dcnv2", "finalmlp"])
def test_a_model_learns_from_files_and_is_exported(
    stage: int, folders: tuple[Path, Path], prepare_here: Callable[..., None], tmp_path: Path
) -> None:
    """By the recipe as it is, but for fewer steps, of fewer rows; the L2 term is for sets of a published size."""
    small = ("TRAIN_STEPS=60", "BATCH_SIZE=256", "LEARNING_RATE=0.01", "recipe.Recipe.eval_every=0")
    made = recipe(stage, folders[0], *small, "table_norm.TableNorm.scale=1e-4", "ranker.Ranker.table_scale=0.05")
    prepare_here(made.mixture.tasks[0])
    train(made, tmp_path / "run")
    [result] = evaluate_run(made, tmp_path / "run").values()
    values = {name: system.values["auc"] for name, system in result.systems.items()}
    assert values["model"] > max(values["item_rate"], values["user_rate"]) + 0.02
    bundle = RankBundle(export_run(load(made, tmp_path / "run"), tmp_path / "bundle"))
    reader = RowReader(Examples.open(place_of(made.mixture.tasks[0]).path), "test")
    rows = WORLD.frame()[0].filter(split="test").drop("split", "label").head(50).to_dicts()
    found = bundle.fields([RankQuestion(candidates=rows)])
    for name, wanted in reader.read(np.arange(50)).items():
        if name.startswith("field/"):
            assert found[name].tobytes() == wanted.tobytes(), name


def test_the_world_is_as_hard_as_it_says() -> None:
    frame, chance = WORLD.frame()
    label = frame["label"].to_numpy() > 0
    assert abs(label.mean() - chance.mean() / 2**16) < 0.02
    assert auc(chance.astype(np.float64), label) > 0.8
    parts = frame["split"].value_counts(sort=True)
    assert parts["split"].to_list() == ["train", "valid", "test"]
    np.testing.assert_allclose(parts["count"] / frame.height, [0.7, 0.2, 0.1], atol=0.02)
    assert_frame_equal(frame, WORLD.frame()[0])
    with pytest.raises(ConfigError):
        CategoryWorld(names=("a", "b"), sizes=(3,))


def test_the_norm_pulls_at_every_row() -> None:
    """Its gradient is the table itself, times the scale, whatever the batch holds."""
    field = FieldShape(name="user", kind="categorical", rows=30, offset=2)
    model = Functional(
        lambda rngs: Ranker(
            num_rows=128, fields=(field,), interaction=Flat(), inputs=FieldConfig(width=4), norm=True, rngs=rngs
        )
    )
    params: Any = model.init(jax.random.key(0))
    norm = TableNorm(scale=0.05)
    for rows, weight in ((3, 1.0), (8, 0.5)):
        batch = {"field/user": jnp.full(rows, 5), "weight": jnp.full(rows, weight)}

        def loss(params: Any, batch: Any = batch) -> jax.Array:
            found = norm(model.apply(params, batch, train=True, key=None), batch, {}, jax.random.key(0))
            return norm.scale * found.total / found.weight

        value, gradient = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(value, 0.025 * np.square(params["table"]).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient["table"], 0.05 * params["table"], rtol=1e-5)
    assert "norm/table" not in model.apply(params, batch, train=False, key=None)
