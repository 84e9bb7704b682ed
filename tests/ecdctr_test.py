"""The recipe ecdctr: one network for both surfaces, what crosses between them, a calendar that never looks ahead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from recjax import command
from recjax.core.errors import ArtifactError
from recjax.core.flags import Flags, config_root, recipe_files
from recjax.core.state import by_path
from recjax.core.warm_start import WarmStart
from recjax.data.examples import Examples
from recjax.data.field_tables import FieldTables
from recjax.data.rows_feed import RowReader
from recjax.list import read_header
from recjax.recipe import Assembly, Recipe
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions
from recjax.train import train

FOLDER, TINY = config_root() / "recipe" / "ecdctr", config_root() / "run" / "tiny.gin"
NORM = re.compile("(^|/)norm[0-9]*/")


def recipe_of(stem: str, stages: Path | str = "/nowhere") -> Recipe:
    text = (FOLDER / f"{stem}.gin").read_text()
    bindings = (f"STAGES={str(stages)!r}",) if "%STAGES" in text else ()
    flags = Flags(gin_files=(str(FOLDER / f"{stem}.gin"), str(TINY)), bindings=bindings)
    return command.load(flags)[0]


def impressions(recipe: Recipe) -> Impressions:
    [task] = recipe.mixture.tasks
    assert isinstance(task, Impressions)
    return task


def assembled(recipe: Recipe, prepare_here: Callable[..., None]) -> Assembly:
    prepare_here(impressions(recipe))
    return Assembly(recipe, [Examples.open(place_of(impressions(recipe)).path)])


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, prepare_here: Callable[..., None]) -> Path:
    """The folder in which a tiny CPM has been trained."""
    folder = tmp_path_factory.mktemp("stages")
    recipe = recipe_of("6_cpm_alone", folder)
    prepare_here(impressions(recipe))
    train(recipe, folder / "6_cpm_alone")
    return folder


@pytest.mark.heavy
def test_what_crosses_is_everything_but_batch_norms(stages: Path, prepare_here: Callable[..., None]) -> None:
    cpm = assembled(recipe_of("6_cpm_alone", stages), prepare_here)
    recipe = recipe_of("10_cpm", stages)
    ads = assembled(recipe, prepare_here)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cpm.abstract_params()) == jax.tree.map(
        lambda x: (x.shape, x.dtype), ads.abstract_params()
    )
    assert cpm.vocabulary_hash == ads.vocabulary_hash  # a row of the table is the same value on both surfaces
    assert recipe.warm_start is not None
    start = WarmStart(checkpoints=str(stages), stage="6_cpm_alone")
    with cpm.mesh.activate():
        there = cpm.warm_started(cpm.init_state(), start)[0].params
        fresh = ads.init_state()
        begun, taken = ads.warm_started(fresh, recipe.warm_start)
        here = begun.params
    dropped = 0
    trained, untouched = by_path(there), by_path(fresh.params)
    for path, value in by_path(here).items():
        from_where = untouched if NORM.search(path) else trained
        np.testing.assert_array_equal(value, from_where[path], err_msg=path)
        dropped += bool(NORM.search(path)) and not np.array_equal(trained[path], untouched[path])
    assert dropped > 4
    assert taken.left == taken.fresh == [path for path in by_path(here) if NORM.search(path)]
    assert set(taken.copied) | set(taken.fresh) == set(by_path(here))
    # with the batch norms of CPM put back it is CPM
    reader = RowReader(ads.examples[0], "test")
    batch = {name: x for name, x in reader.read(np.arange(16)).items() if name.startswith("field/")}
    back = jax.tree_util.tree_map_with_path(
        lambda path, x: trained[k] if NORM.search(k := "/".join(str(p.key) for p in path)) else x, here
    )
    said = [ads.model.apply(p, batch, train=False, key=None)["logit/click"] for p in (here, back, there)]
    np.testing.assert_array_equal(said[1], said[2])
    assert np.any(np.asarray(said[0]) != np.asarray(said[1]))


@pytest.mark.heavy
def test_a_start_that_has_seen_these_rows_is_refused(stages: Path, prepare_here: Callable[..., None]) -> None:
    recipe = recipe_of("10_cpm", stages)
    task = dataclasses.replace(impressions(recipe), window=(0.6, 1.0))
    prepare_here(task)
    later = Assembly(recipe, [Examples.open(place_of(task).path)])
    assert recipe.warm_start is not None
    with later.mesh.activate(), pytest.raises(ArtifactError, match="trained on rows until"):
        later.warm_started(later.init_state(), recipe.warm_start)


def test_the_calendar_reads_nothing_from_its_future() -> None:
    """Whatever a stage is told ended before its own rows begin; all arms hold out the same ads."""
    windows, arms = {}, set()
    for file in recipe_files("ecdctr"):
        recipe = recipe_of(file.stem)
        task = impressions(recipe)
        windows[file.stem] = task.window
        told = [fact.stage for fact in recipe.facts if isinstance(fact, FieldTables) and fact.earlier]
        assert len(told) == len(recipe.facts)
        for earlier in told:
            assert windows[earlier][1] <= task.window[0], (file.stem, earlier)
        start = recipe.warm_start
        if start is not None and "tpm" not in file.stem:
            assert start.earlier and windows[start.stage][1] <= task.window[0]
        if read_header(file).compared:
            arms.add((task.cuts, task.only or task.held_out))
    assert arms == {((0.85, 0.875), "surface == ads")}
