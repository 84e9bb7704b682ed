"""Every recipe that is shipped: its header, its macros, that all it says has an effect, and that it trains."""

from __future__ import annotations

import functools
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from recjax import command
from recjax.cli import VERBS
from recjax.core import config
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, all_recipe_files, config_root, find_file, recipe_files
from recjax.core.module import Functional
from recjax.core.writer import read_metrics
from recjax.data.examples import Examples
from recjax.data.fields import FIRST_ROW, PRESENT, FieldShape
from recjax.data.rows_feed import RowsFeed
from recjax.infer import infer_run
from recjax.label_evaluation import LabelEvaluation
from recjax.list import read_header
from recjax.models.sequence import count_parameters
from recjax.recipe import Assembly, Recipe
from recjax.tasks.cache import place_of
from recjax.train import train
from recjax.trained import load

TINY = config_root() / "run" / "tiny.gin"
TINY_TEXT = config_root() / "run" / "tiny_text.gin"
SHARDED = ("MESH='data=4,model=2'", "SHARDING='fsdp_model'")
# Non-embedding parameters of the sizes in Zhang et al. 2024, table 1.
SIZES = {
    "lsrm_98k": 98_304,
    "lsrm_786k": 786_432,
    "lsrm_1m6": 1_572_864,
    "lsrm_9m4": 9_437_184,
    "lsrm_75m": 75_497_472,
    "lsrm_829m": 829_440_000,
}

every_stage = pytest.mark.parametrize("stage", all_recipe_files(), ids=lambda path: f"{path.parent.name}-{path.stem}")


def build(stage: Path, *more: Path, bindings: tuple[str, ...] = (), stages: Path | None = None) -> Recipe:
    if "%STAGES" in stage.read_text():
        bindings += (f"STAGES={str(stages or '/stages')!r}",)
    return command.load(Flags(gin_files=tuple(map(str, (stage, *more))), bindings=bindings))[0]


def build_tiny(stage: Path, stages: Path) -> Recipe:
    reads_text = isinstance(build(stage, stages=stages).evaluation, LabelEvaluation)
    return build(stage, TINY_TEXT if reads_text else TINY, bindings=SHARDED, stages=stages)


@pytest.fixture
def examples(prepare_here: Callable[..., None]) -> Callable[[Recipe], list[Examples]]:
    """The examples of a tiny recipe, made without TensorFlow."""

    def make(recipe: Recipe) -> list[Examples]:
        for task in recipe.mixture.evaluated:
            prepare_here(task)
        return [Examples.open(place_of(task).path) for task in recipe.mixture.evaluated]

    return make


@every_stage
def test_the_header_says_what_to_expect_and_its_command_runs_it(stage: Path) -> None:
    header = read_header(stage)
    assert header.title and header.paper and header.data and header.expected
    assert header.cost or not header.measured  # what was measured took a known time
    program, verb, name, *flags = shlex.split(header.command)
    assert program == "recjax" and verb in VERBS and stage in recipe_files(name)
    assert all(flag.startswith("--") for flag in flags)


@every_stage
def test_all_macros_are_taken_and_no_other(stage: Path) -> None:
    given = {
        "DATA_DIR": "/somewhere",
        "SEED": 7,
        "TRAIN_STEPS": 12_345,
        "BATCH_SIZE": 48,
        "LEARNING_RATE": 0.0625,
        "MESH": "data=2,model=4",
        "SHARDING": "fsdp_model",
    }
    if "DATA_DIR = %SOURCE_DIR" in stage.read_text():
        given["SOURCE_DIR"] = given.pop("DATA_DIR")
    recipe = build(stage, bindings=tuple(f"{name}={value!r}" for name, value in given.items()))
    assert {task.data.path for task in recipe.mixture.tasks} == {"/somewhere"}
    assert (recipe.seed, recipe.train_steps, recipe.feed.batch_size) == (7, 12_345, 48)
    assert recipe.optimizer.learning_rate == 0.0625
    assert (recipe.mesh.shape, recipe.mesh.preset) == ("data=2,model=4", "fsdp_model")
    assert recipe.name == stage.parent.name
    with pytest.raises(ConfigError, match="macro STEPS is set but nothing uses it"):
        build(stage, bindings=("STEPS=3",))


def bound(text: str) -> set[str]:
    """The macros and parameters that gin text binds."""
    return set(re.findall(r"^([\w./]+) = ", text, re.MULTILINE))


def declared(recipe: Recipe) -> tuple[FieldShape, ...]:
    """Fields as the task of a ranker declares them, of some size."""
    task: Any = recipe.mixture.tasks[0]
    found = []
    for one in task.fields:
        for name, _ in one.sources:
            rows = 0 if one.kind in ("numeric", "vector") else 100
            width = 0 if one.kind in ("categorical", "numeric") else 4
            of = getattr(one, "of", "")
            found.append(FieldShape(name=name, kind=one.kind, rows=rows, offset=rows and FIRST_ROW, width=width, of=of))
            if getattr(one, "presence", False):
                found.append(FieldShape(name=name + PRESENT, kind="numeric"))
    return tuple(found)


@every_stage
def test_every_binding_has_an_effect(stage: Path) -> None:
    """gin lets a class be bound that nothing ever builds."""
    recipe = build(stage)
    assert not config.unused()
    told = {"fields": declared(recipe)} if isinstance(recipe.feed, RowsFeed) else {}
    model = Functional(lambda rngs: recipe.model(num_rows=128, rngs=rngs, **told))
    jax.eval_shape(model.init, jax.random.key(0))  # the model is built late, and its parts with it
    said = config.snapshot()
    used = bound(said.operative)
    used |= {name.rpartition("/")[2] for name in used}  # a binding without a scope holds in every scope
    assert bound(said.config) and bound(said.config) - used == set()


@pytest.fixture(scope="module")
def stages_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which the stages of a recipe leave what later ones need; each is trained once."""
    return functools.cache(lambda name: tmp_path_factory.mktemp(name))


def needs(stage: Path) -> list[Path]:
    """The earlier stages whose artifacts or checkpoints a stage takes up."""
    text = stage.read_text()
    return [s for s in recipe_files(stage.parent.name) if "%STAGES" in text and f"'{s.stem}'" in text and s != stage]


def leave_behind(stage: Path, stages: Path, examples: Callable) -> None:
    """What a stage needs of earlier ones, and these of still earlier ones."""
    for earlier in needs(stage):
        if (place := stages / earlier.stem).exists():
            continue
        leave_behind(earlier, stages, examples)
        recipe = build_tiny(earlier, stages)
        examples(recipe)
        train(recipe, place)
        for kind in read_header(earlier).infer.replace(",", " ").split():
            infer_run(load(recipe, place), kind=kind, out=place / "artifacts" / kind)


def classes(file: Path) -> set[str]:
    """What a gin file and its includes build."""
    text = file.read_text()
    included = (classes(find_file(name, ())) for name in re.findall(r"^include '([^']+)'", text, re.MULTILINE))
    return set(re.findall(r"@(?:\w+/)*([\w.]+)", text)).union(*included)


def to_train() -> list[Any]:
    """Every stage; the fast tests take the last of a recipe, with what it needs, and stages that build something new.

    Test processes share them out by recipe (`conftest.py`).
    """
    built: set[str] = set()

    def train_with_what_it_needs(stage: Path) -> None:
        for one in needs(stage):
            train_with_what_it_needs(one)
        built.update(classes(stage))

    fast = {recipe_files(path.parent.name)[-1] for path in all_recipe_files()}
    for stage in sorted(fast):
        train_with_what_it_needs(stage)
    for stage in all_recipe_files():
        if classes(stage) - built:
            fast.add(stage)
            train_with_what_it_needs(stage)
    return [
        pytest.param(path, id=f"{path.parent.name}-{path.stem}", marks=[] if path in fast else [pytest.mark.heavy])
        for path in all_recipe_files()
    ]


@pytest.fixture
def roughly_compiled() -> Iterator[None]:
    """Up to a third less time: programs of two steps need not be fast, and what they compute is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("roughly_compiled")
@pytest.mark.parametrize("stage", to_train())
def test_it_trains_sharded_in_its_tiny_mode(
    stage: Path, examples: Callable, stages_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A stage that needs what earlier ones leave behind comes after them, as in `recjax run`."""
    stages = stages_of(stage.parent.name)
    leave_behind(stage, stages, examples)
    recipe = build_tiny(stage, stages)
    examples(recipe)
    outcome = train(recipe, tmp_path / stage.stem)
    losses = [r["train/loss"] for r in read_metrics(tmp_path / stage.stem / "metrics.jsonl") if "train/loss" in r]
    assert recipe.train_steps == outcome.step == len(losses) == 2 and all(map(math.isfinite, losses))
    assert outcome.best is not None and math.isfinite(outcome.best)


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_root() / "model").glob("lsrm_*.gin")))
def test_a_published_size_has_the_published_number_of_parameters(name: str, examples: Callable) -> None:
    path = config_root() / "model" / f"{name}.gin"
    assert f"N = 12 n d^2 = {SIZES[name]:,} outside the tables" in path.read_text()
    [sasrec] = recipe_files("sasrec")
    recipe = build(sasrec, TINY, path, bindings=SHARDED)
    params: Any = Assembly(recipe, examples(recipe)).abstract_state().params
    assert count_parameters(params)["backbone"] == SIZES[name]
