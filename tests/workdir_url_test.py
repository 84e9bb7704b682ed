"""A run in an object store: killed, taken up on another machine, evaluated and exported, with nothing local.

Every process has a home of its own, empty at first, so that all it knows comes from the bucket: the workdir, and the
prepared examples from a cache at a URL.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recjax import command, evaluate, export, trained
from recjax.core import saved
from recjax.core.checkpoint import Checkpointer
from recjax.core.errors import CheckpointError, ExamplesError
from recjax.core.flags import Flags
from recjax.core.remote import Store, download
from recjax.core.state import by_path
from recjax.core.writer import read_metrics
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.results import System
from recjax.serve.bundle import Bundle
from recjax.tasks.cache import place_of, share
from recjax.train import CHECKPOINTS, train

MORE = "TRAIN_STEPS=9", "recipe.Recipe.log_every=1", "checkpoint.Checkpoints.every=3", "recipe.Recipe.eval_every=3"

# `recjax train`, killed when half of the checkpoint of step 6 has been copied.
KILLED = """
import os, signal, sys
from recjax.core import mirror
from recjax.core.remote import Store
mirror.EVERY = 0.05
real = Store.put
def put(self, file, name):
    real(self, file, name)
    if "000000006" in name:
        os.kill(os.getpid(), signal.SIGKILL)
Store.put = put
from recjax.core.checkpoint import Checkpointer
save = Checkpointer.save
def slow(self, state, **told):  # every checkpoint is copied before the next one
    save(self, state, **told)
    self.wait()
    __import__("time").sleep(2)
Checkpointer.save = slow
from recjax import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def home(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A function that moves to another machine: a home where nothing is, and a cache at a URL."""

    def move(name: str) -> Path:
        monkeypatch.setenv("HOME", str(tmp_path / name))
        monkeypatch.setenv("RECJAX_CACHE", f"{s3}/cache")
        return tmp_path / name

    return move


def arrays(recipe: Recipe, folder: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint, which is of the last step."""
    with Checkpointer(folder / CHECKPOINTS, recipe.checkpoints) as checkpoints:
        restored = checkpoints.restore(Assembly(recipe, ensure_prepared(recipe.mixture)).abstract_state())
    assert restored is not None and restored.record.step == recipe.train_steps
    return {path: np.asarray(leaf) for path, leaf in by_path(restored.state).items()}


def same(recipe: Recipe, plain: Path, there: Path) -> None:
    """Two runs to the last step have the same lines and the same arrays."""
    assert lines(plain) == lines(there)
    want, got = arrays(recipe, plain), arrays(recipe, there)
    assert want.keys() == got.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def lines(folder: Path) -> list[dict[str, float]]:
    found = read_metrics(folder / "metrics.jsonl")
    return [{name: v for name, v in line.items() if not name.startswith("time/")} for line in found]


def test_stopped_and_taken_up_elsewhere(
    s3: str, home: Callable[[str], Path], tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = System(rank=np.zeros(1, np.int32), values={"recall@10": 0.0, "ndcg@10": 0.0})
    monkeypatch.setattr(Assembly, "evaluator", lambda *args: lambda params: found)
    examples = place_of(tiny_recipe.mixture.tasks[0]).path
    stages = [dataclasses.replace(tiny_recipe, train_steps=last) for last in (2, 4)]
    for stage in stages:
        train(stage, tmp_path / "plain")
    for number, stage in enumerate(stages):
        machine = home(f"machine{number}")
        (machine / ".cache" / "recjax").mkdir(parents=True)
        (machine / ".cache" / "recjax" / examples.name).symlink_to(examples)
        train(stage, Path(f"{s3}/runs/stopped"))
    download(f"{s3}/runs/stopped", tmp_path / "there", error=CheckpointError)
    same(tiny_recipe, tmp_path / "plain", tmp_path / "there")


@pytest.mark.heavy
def test_killed_and_taken_up_elsewhere_it_is_the_run_that_was_not(
    s3: str, home: Callable[[str], Path], tiny_gin: Path, tmp_path: Path
) -> None:
    flags = Flags(gin_files=(str(tiny_gin),), bindings=MORE)
    recipe, _ = command.load(flags)
    train(recipe, tmp_path / "plain")
    task = recipe.mixture.tasks[0]
    made_here = place_of(task)
    home("first")
    share(dataclasses.replace(place_of(task), path=made_here.path))
    url = f"{s3}/runs/one"
    words = [f"--gin_file={tiny_gin}", *(f"--gin.{binding}" for binding in MORE), f"--workdir={url}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    there = list(Store(url, CheckpointError).listing())
    assert f"{CHECKPOINTS}/{saved.name_of(3)}/{saved.FILES}" in there
    half = [name for name in saved.unfinished(there) if name.startswith(f"{CHECKPOINTS}/{saved.name_of(6)}/")]
    assert half and {"config.gin", "manifest.json", "metrics.jsonl"} <= {*there}

    second = home("second")
    outcome = train(recipe, Path(url))
    assert outcome.step == 9
    assert list((second / ".cache" / "recjax").glob(f"{task.name}-*/manifest.json"))
    there = list(Store(url, CheckpointError).listing())
    assert not saved.unfinished(there) and not [name for name in there if saved.name_of(3) in name]
    download(url, tmp_path / "there", error=CheckpointError)
    same(recipe, tmp_path / "plain", tmp_path / "there")


@pytest.mark.heavy
def test_it_is_evaluated_and_exported_from_there(
    s3: str, home: Callable[[str], Path], tiny_gin: Path, tmp_path: Path
) -> None:
    recipe, snapshot = command.load(Flags(gin_files=(str(tiny_gin),)))
    task, made_here = recipe.mixture.tasks[0], place_of(recipe.mixture.tasks[0])
    home("first")
    share(dataclasses.replace(place_of(task), path=made_here.path))
    url = f"{s3}/runs/two"
    train(recipe, Path(url), snapshot=snapshot)
    download(url, tmp_path / "there", error=CheckpointError)
    home("second")
    assert evaluate.main([f"--workdir={url}"]) == 0  # the recipe too comes from there
    want = evaluate.evaluate_run(recipe, tmp_path / "there")[task.name]
    download(f"{url}/test", tmp_path / "test", error=CheckpointError)
    with np.load(tmp_path / "test" / "per_user.npz") as got, np.load(tmp_path / "there/test/per_user.npz") as expected:
        assert {*got} == {*expected} and all(np.array_equal(got[name], expected[name]) for name in got)
    got = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert got["rows"]["model"]["ndcg@10"] == want.metrics()["rows"]["model"]["ndcg@10"]
    run = trained.load(recipe, Path(url))
    export.export_run(run, Path(f"{s3}/bundles/1"))
    download(f"{s3}/bundles/1", tmp_path / "bundle", error=CheckpointError)
    assert Bundle(tmp_path / "bundle").vocab == run.assembly.vocab


def test_a_shared_cache_is_filled_once_and_what_comes_from_it_is_checked(
    s3: str, home: Callable[[str], Path], tiny_gin: Path
) -> None:
    recipe, _ = command.load(Flags(gin_files=(str(tiny_gin),)))
    task, made_here = recipe.mixture.tasks[0], place_of(recipe.mixture.tasks[0])
    first = home("first")
    place = place_of(task)
    assert place.shared == f"{s3}/cache/{place.path.name}" and place.path.is_relative_to(first)
    store = Store(place.shared, ExamplesError)
    for name in store.listing():
        store.remove(name)
    shutil.copytree(made_here.path, place.path)
    store.put(place.path / "titles.json", "titles.json")  # and then the process was killed
    share(place)
    share(place)
    assert store.listing().keys() == {path.name for path in made_here.path.iterdir()}
    home("second")
    assert ensure_prepared(recipe.mixture)[0].hash == place.content_hash
    shard = next(name for name in store.listing() if name.endswith(".arrayrecord"))
    damaged = bytearray((place.path / shard).read_bytes())
    damaged[-1] ^= 1
    (first / "damaged").write_bytes(damaged)
    store.put(first / "damaged", shard)
    third = home("third")
    with pytest.raises(ExamplesError, match="was altered"):
        ensure_prepared(recipe.mixture)
    assert not list(third.rglob("manifest.json"))
