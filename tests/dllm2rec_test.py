"""Distillation from end to end: a teacher's artifacts reach the student, other students fit the same arms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from recjax import command
from recjax.core.flags import Flags, config_root
from recjax.data.examples import Examples
from recjax.data.pipeline import train_batches
from recjax.infer import infer_run
from recjax.nn.recurrent import Recurrent
from recjax.recipe import Assembly, Recipe
from recjax.tasks.cache import place_of
from recjax.train import train
from recjax.trained import load

FOLDER = config_root() / "recipe" / "dllm2rec"
TINY = config_root() / "run" / "tiny.gin"


def recipe_of(*files: str, stages: Path) -> Recipe:
    text = (FOLDER / files[0]).read_text()
    bindings = (f"STAGES={str(stages)!r}",) if "%STAGES" in text else ()
    paths = (*(str(FOLDER / file) for file in files), str(TINY))
    return command.load(Flags(gin_files=paths, bindings=bindings))[0]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, prepare_here: Callable[..., None]) -> Path:
    """The folder of a tiny teacher and what it wrote for its students."""
    folder = tmp_path_factory.mktemp("stages")
    teacher = recipe_of("1_teacher.gin", stages=folder)
    for task in teacher.mixture.tasks:
        prepare_here(task)
    train(teacher, folder / "1_teacher")
    for kind in ("teacher_rankings", "item_vectors"):
        infer_run(load(teacher, folder / "1_teacher"), kind=kind, out=folder / "1_teacher" / "artifacts" / kind)
    return folder


@pytest.mark.heavy
def test_another_student_is_fed_what_the_teacher_wrote(stages: Path) -> None:
    recipe = recipe_of("5_weak_both.gin", "gru4rec.gin", stages=stages)
    assembly = Assembly(recipe, [Examples.open(place_of(task).path) for task in recipe.mixture.tasks])
    assert isinstance(assembly.model.bind(assembly.abstract_params()).encoder, Recurrent)
    step, state, const = assembly.train_step(), assembly.init_state(), assembly.const()
    batches = train_batches(assembly.examples, [1.0], recipe.feed, seed=0)
    with assembly.mesh.activate():
        for _ in range(2):
            batch = next(batches)
            assert (batch["teacher/rows"][batch["weight"] > 0] > 0).all()
            state, metrics = step(state, assembly.mesh.put_batch(batch), const)
    found = jax.device_get(metrics)
    assert found["loss"] > found["next_item"] and found["ranking"] > 0 and 0 <= found["ranking/overlap"] <= 1


def test_the_robust_student_has_both_losses(stages: Path) -> None:
    recipe = recipe_of("2_weak.gin", "dros.gin", stages=stages)
    assert [o.name for o in recipe.objectives] == ["next_item", "robust"]
