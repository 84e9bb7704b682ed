"""What the arms of the distillation recipes share and differ in: what is served, and what labels are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from recjax import command
from recjax.core.flags import Flags, recipe_files
from recjax.core.module import Functional
from recjax.core.state import by_path
from recjax.data.fields import FIRST_ROW, FieldShape
from recjax.losses.head_distillation import SELECTORS, SelfDistillation, TeacherDistillation
from recjax.recipe import Recipe

FIELDS = (
    FieldShape(name="user_id", kind="categorical", rows=60, offset=FIRST_ROW),
    FieldShape(name="item_id", kind="categorical", rows=60, offset=FIRST_ROW + 60),
    FieldShape(name="age", kind="numeric"),
)
TEACHERS = ("1_teacher", "2_teacher_half", "3_teacher_biased")
NARROW = ("13_narrow_hard", "14_narrow_auxiliary")


def recipe_of(file: Path, *bindings: str) -> Recipe:
    if "%STAGES" in file.read_text():
        bindings += ("STAGES='/stages'",)
    return command.load(Flags(gin_files=(str(file),), bindings=bindings))[0]


def shapes(recipe: Recipe, **more: Any) -> dict[str, tuple[int, ...]]:
    """Of all parameters, by path."""
    model = Functional(lambda rngs: recipe.model(num_rows=128, fields=FIELDS, rngs=rngs, **more))
    return {path: x.shape for path, x in by_path(jax.eval_shape(model.init, jax.random.key(0))).items()}


def by_stem(system: str) -> dict[str, Path]:
    return {file.stem: file for file in recipe_files(system)}


@pytest.mark.parametrize(
    ("system", "first", "others"),
    [
        ("self_aux_distill", "1_hard", ()),
        ("aux_distill", "4_hard", (*TEACHERS, *NARROW)),
        ("aux_distill_stream", "2_hard", ("1_teacher",)),
    ],
)
def test_every_arm_is_exported_with_the_parameters_of_the_baseline(
    system: str, first: str, others: tuple[str, ...]
) -> None:
    files = by_stem(system)
    plain = shapes(recipe_of(files[first]))
    for stem, file in files.items():
        recipe = recipe_of(file)
        is_taught = any(isinstance(o, SelfDistillation | TeacherDistillation) for o in recipe.objectives)
        taught, served = shapes(recipe), shapes(recipe, auxiliary=False)
        assert (served == plain) == (stem not in others), stem
        assert (taught != served) == (is_taught and "direct" not in stem), stem


def test_the_narrow_student_and_its_baseline_are_the_same_model() -> None:
    files = by_stem("aux_distill")
    one, other = (shapes(recipe_of(files[stem]), auxiliary=False) for stem in NARROW)
    assert one == other


def test_the_recipe_runs_every_selector() -> None:
    objectives = [o for file in recipe_files("self_aux_distill") for o in recipe_of(file).objectives]
    found = [o.selector for o in objectives if isinstance(o, SelfDistillation)]
    told = {s if isinstance(s, str) else type(s).__name__.lower() for s in found}
    assert told == set(SELECTORS) - {"soft_neg"}  # which is "max"


@pytest.mark.parametrize("hidden", [0.3, 0.5])
def test_one_override_hides_positives_in_every_arm(hidden: float) -> None:
    for file in recipe_files("self_aux_distill"):
        feed: Any = recipe_of(file, f"HIDDEN={hidden}").feed
        assert feed.hidden.share == hidden
        assert bool(feed.hidden.domains) == ("lost" in file.stem)
