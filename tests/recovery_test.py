"""What a run loses when things break: nothing but the step under way, on the machine it began on or on another."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from recjax.core import saved
from recjax.core.checkpoint import Checkpointer, Checkpoints
from recjax.core.optim import Group, Optimizer
from recjax.core.sharding import MeshConfig
from recjax.core.state import by_path
from recjax.core.writer import RunWriter, read_metrics
from recjax.losses.sampled import SampledSoftmax
from recjax.nn.transformer import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.results import System
from recjax.train import CHECKPOINTS, train


@pytest.fixture
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No evaluation: what it finds is not the matter here, and compiling it for every mesh takes long."""
    found = System(rank=np.zeros(1, np.int32), values={"recall@10": 0.0, "ndcg@10": 0.0})
    monkeypatch.setattr(Assembly, "evaluator", lambda *args: lambda params: found)


ROWS = 384  # of the item table: 8, 6 and 2 devices share them evenly


@pytest.fixture(scope="module")
def divisible(tiny_recipe: Recipe) -> Recipe:
    """Batch, table and width are divided by 8, 6 and 2; the table is trained row by row, dropout is on.

    The rest is trained by SGD: Adam would blow up the rounding in gradients that are zero, as that of a bias of keys.
    """
    transformer = TransformerConfig(num_layers=1, width=24, num_heads=2, dropout=0.1)
    groups = (("^table$", Group(kind="rowwise_adam")),)
    recipe = dataclasses.replace(
        tiny_recipe,
        model=tiny_recipe.model.with_(transformer, 0.1),
        feed=dataclasses.replace(tiny_recipe.feed, batch_size=24),
        objectives=[SampledSoftmax(num_negatives=32)],
        optimizer=Optimizer(kind="sgd", learning_rate=0.01, groups=groups),
        train_steps=9,
    )
    assert ensure_prepared(recipe.mixture)[0].vocab.num_rows == ROWS
    return recipe


def on(recipe: Recipe, devices: int, steps: int = 0) -> dict[str, Any]:
    """The arguments of `train` for so many devices, tables and optimiser rows cut into as many parts."""
    mesh = MeshConfig(shape=f"data={devices}", preset="fsdp" if devices > 1 else "data")
    told = dataclasses.replace(recipe, mesh=mesh, train_steps=steps or recipe.train_steps)
    return {"recipe": told, "devices": jax.devices()[:devices]}


def losses(workdir: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]


def checkpoint(workdir: Path, recipe: Recipe, devices: list[Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of the newest checkpoint, laid out over `devices`, and the position that goes with them."""
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture), devices)
    with Checkpointer(workdir / CHECKPOINTS, recipe.checkpoints) as checkpoints:
        restored = checkpoints.restore(assembly.abstract_state())
    assert restored is not None
    for path, leaf in by_path(restored.state).items():
        if leaf.shape[:1] == (ROWS,):
            assert {part.data.shape[0] for part in leaf.addressable_shards} == {ROWS // len(devices)}, path
    return {path: np.asarray(leaf) for path, leaf in by_path(restored.state).items()}, restored.iterator


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


def rows_of(recipe: Recipe, position: dict[str, Any], processes: int) -> list[dict[str, np.ndarray]]:
    """The next three batches after a position, put together from what so many processes are fed."""
    assembly = Assembly(**{k: v for k, v in on(recipe, 1).items()} | {"examples": ensure_prepared(recipe.mixture)})
    feeds = [assembly.batches(process_index=i, process_count=processes) for i in range(processes)]
    for feed in feeds:
        feed.set_state(position["data"])
    parts = [[next(feed) for feed in feeds] for _ in range(3)]
    return [{name: np.concatenate([part[name] for part in batch]) for name in batch[0]} for batch in parts]


@pytest.mark.usefixtures("unjudged")
@pytest.mark.parametrize("kind", ["rowwise_adam", pytest.param("rowwise_adagrad", marks=pytest.mark.heavy)])
def test_a_run_goes_on_with_8_then_6_then_2_devices(divisible: Recipe, tmp_path: Path, kind: str) -> None:
    """Dense weights, table rows and their optimiser rows come back bit by bit, the examples are the same, and the
    curve is that of the run that never moved, but for the order in which devices add up (float32, nine steps).
    """
    groups = (("^table$", Group(kind=kind)),)
    recipe = dataclasses.replace(divisible, optimizer=dataclasses.replace(divisible.optimizer, groups=groups))
    train(workdir=tmp_path / "plain", **on(recipe, 8))
    for devices, last in ((8, 3), (6, 6), (2, 9)):
        train(workdir=tmp_path / "moved", **on(recipe, devices, last))
        restored = [checkpoint(tmp_path / "moved", **on(recipe, count, last)) for count in (8, 6, 2)]
        assert any(path.startswith("opt_state") and leaf.shape == (ROWS,) for path, leaf in restored[0][0].items())
        for other, position in restored[1:]:
            same(other, restored[0][0])
            assert position == restored[0][1]
    feeds = [rows_of(recipe, restored[0][1], processes) for processes in (1, 8, 6, 2)]
    for feed in feeds[1:]:
        for batch, alone in zip(feed, feeds[0], strict=True):
            same(batch, alone)
    plain, moved = (losses(tmp_path / name) for name in ("plain", "moved"))
    assert len(plain) == len(moved) == 9 and plain[:3] == moved[:3]
    np.testing.assert_allclose(moved, plain, rtol=5e-5)
    want, got = (checkpoint(tmp_path / name, **on(recipe, 8))[0] for name in ("plain", "moved"))
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=2e-3, atol=2e-5, err_msg=path)


@pytest.mark.usefixtures("unjudged")
def test_on_the_same_devices_it_is_the_same_to_the_bit(divisible: Recipe, tmp_path: Path) -> None:
    train(workdir=tmp_path / "plain", **on(divisible, 8))
    for last in (2, 5, 9):
        train(workdir=tmp_path / "stopped", **on(divisible, 8, last))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "plain")
    want, got = (checkpoint(tmp_path / name, **on(divisible, 8)) for name in ("plain", "stopped"))
    same(got[0], want[0])
    assert got[1]["data"] == want[1]["data"]


class Broken(Exception):
    """Something that nobody foresaw."""


def lines(workdir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    found = read_metrics(workdir / "metrics.jsonl")
    return [{name: v for name, v in line.items() if not name.startswith("time/")} for line in found]


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["loader", "evaluation", "writer"])
def test_an_error_loses_no_step_that_was_done(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    """Whatever breaks after step 4 of 6, step 4 is saved, and the run that is started again is the one unbroken."""
    recipe = dataclasses.replace(tiny_recipe, eval_every=2, train_steps=6, checkpoints=Checkpoints(every=100))
    train(workdir=tmp_path / "plain", **on(recipe, 1))
    calls = 0

    def breaks(real: Any, last: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > last:
                raise error
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(error):
        if place == "loader":
            real = Assembly.batches

            def batches(self: Assembly, **kwargs: Any) -> Any:
                made = real(self, **kwargs)
                patch.setattr(type(made), "__next__", breaks(type(made).__next__, 4))
                return made

            patch.setattr(Assembly, "batches", batches)
        elif place == "evaluation":
            real_evaluator = Assembly.evaluator
            patch.setattr(Assembly, "evaluator", lambda *args: breaks(real_evaluator(*args), 1))
        else:  # lines of steps 1, 2, 2 (valid), 3 and then that of step 4
            patch.setattr(RunWriter, "write", breaks(RunWriter.write, 4))
        train(workdir=tmp_path / "broken", **on(recipe, 1))
    assert saved.steps(tmp_path / "broken" / CHECKPOINTS) == [4]
    train(workdir=tmp_path / "broken", **on(recipe, 1))
    want, got = lines(tmp_path / "plain"), lines(tmp_path / "broken")
    if place == "writer":  # the line that could not be written stays away
        want = [line for line in want if (line["step"], "train/loss" in line) != (4, True)]
    assert got == want
    (a, one), (b, other) = (checkpoint(tmp_path / name, **on(recipe, 1)) for name in ("plain", "broken"))
    same(a, b)
    assert one == other


def test_an_error_inside_a_step_saves_nothing(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state was used up: what is left of it is not whole."""
    real = Assembly.train_step

    def train_step(self: Assembly) -> Any:
        step = real(self)

        def call(now: Any, *rest: Any) -> Any:
            if int(now.step) == 2:
                step(now, *rest)
                raise Broken
            return step(now, *rest)

        return call

    monkeypatch.setattr(Assembly, "train_step", train_step)
    with pytest.raises(Broken):
        train(workdir=tmp_path, **on(tiny_recipe, 1))
    assert saved.steps(tmp_path / CHECKPOINTS) == []


def test_a_state_that_is_not_finite_is_not_saved(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Assembly.train_step

    def train_step(self: Assembly) -> Any:
        step = real(self)

        def call(*args: Any) -> Any:
            now, metrics = step(*args)
            return dataclasses.replace(now, params=jax.tree.map(lambda x: x * np.nan, now.params)), metrics

        return call

    monkeypatch.setattr(Assembly, "train_step", train_step)
    monkeypatch.setattr(RunWriter, "progress", lambda *args, **kwargs: (_ for _ in ()).throw(Broken()))
    with pytest.raises(Broken):
        train(workdir=tmp_path, **on(tiny_recipe, 1))
    assert saved.steps(tmp_path / CHECKPOINTS) == []


def start(file: Path, workdir: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "recjax", "train", f"--gin_file={file}", f"--workdir={workdir}", *more]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


SLOW = "--gin.TRAIN_STEPS=1000000", "--gin.recipe.Recipe.log_every=1"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_the_first_notice_saves_and_the_second_does_not_wait(tiny_gin: Path, tmp_path: Path) -> None:
    """Frozen right after the first notice, the process still ends at the second, with the same status for a shell."""
    process = start(tiny_gin, tmp_path, *SLOW, "--gin.recipe.Recipe.eval_every=1")
    wait_for(tmp_path / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    for line in process.stderr:
        if "told to stop" in line:
            break
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    process.wait(timeout=60)
    process.stderr.close()
    assert process.returncode in (-signal.SIGTERM, 143) and time.monotonic() - begun < 5
