"""Training as a whole: what a killed, resumed, sharded or split run must have in common with a plain one."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from recjax.core.checkpoint import Checkpoints
from recjax.core.errors import CheckpointError, MeshError, TrainingError
from recjax.core.lock import LOCK, held
from recjax.core.optim import Optimizer
from recjax.core.sharding import MeshConfig
from recjax.core.writer import read_metrics
from recjax.data.pipeline import train_batches
from recjax.nn.transformer import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.train import CHECKPOINTS, train

SHARDINGS = [("data=8", "data"), ("data=8", "fsdp"), ("data=4,model=2", "fsdp_model"), ("data=4,model=2", "fsdp_text")]


def losses(workdir: Path) -> dict[int, float]:
    return {int(r["step"]): r["train/loss"] for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r}


def on(recipe: Recipe, mesh: str, preset: str = "data") -> Recipe:
    return dataclasses.replace(recipe, mesh=MeshConfig(shape=mesh, preset=preset))


def steps(recipe: Recipe, count: int, devices: int) -> list[float]:
    """The losses of the first steps."""
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture), jax.devices()[:devices])
    batches = train_batches(assembly.examples, recipe.mixture.rates, recipe.feed, seed=recipe.seed)
    found = []
    with assembly.mesh.activate():
        state, step, const = assembly.init_state(), assembly.train_step(), assembly.const()
        for _ in range(count):
            state, metrics = step(state, assembly.mesh.put_batch(next(batches)), const)
            found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(("mesh", "preset"), SHARDINGS)
def test_sharded_training_is_training_on_one_device(tiny_recipe: Recipe, mesh: str, preset: str) -> None:
    """Dropout is on: its bits must not depend on the devices either."""
    expected = steps(on(tiny_recipe, "data=1"), 3, 1)
    np.testing.assert_allclose(steps(on(tiny_recipe, mesh, preset), 3, 8), expected, rtol=2e-5)


@pytest.mark.parametrize(("mesh", "preset"), SHARDINGS[1:3])
def test_no_step_gathers_a_table(tiny_recipe: Recipe, mesh: str, preset: str) -> None:
    recipe = on(tiny_recipe, mesh, preset)
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture))
    batch = next(train_batches(assembly.examples, [1.0], recipe.feed, seed=0))
    with assembly.mesh.activate():
        lowered = assembly.train_step().lower(
            assembly.abstract_state(), assembly.mesh.put_batch(batch), assembly.const()
        )
    text = lowered.compile().as_text()
    gathers = re.findall(r"= \(?\w+\[([\d,]+)\][^=]* all-gather", text)
    assert "all-reduce" in text or "reduce-scatter" in text
    assert not [shape for shape in gathers if str(assembly.vocab.num_rows) in shape.split(",")]


def test_a_model_that_the_mesh_does_not_divide_is_refused(tiny_recipe: Recipe) -> None:
    with pytest.raises(MeshError, match="heads"):
        Assembly(on(tiny_recipe, "data=2,model=4", "fsdp_model"), ensure_prepared(tiny_recipe.mixture))


def test_micro_batches_add_up_to_the_batch(tiny_recipe: Recipe) -> None:
    transformer = TransformerConfig(num_layers=2, width=16, num_heads=2)
    whole = on(dataclasses.replace(tiny_recipe, model=tiny_recipe.model.with_(transformer, 0.0)), "data=2")
    parts = dataclasses.replace(whole, accumulate=4)
    np.testing.assert_allclose(steps(parts, 3, 2), steps(whole, 3, 2), rtol=1e-5)


def test_rematerialised_and_scanned_layers_train_alike(tiny_recipe: Recipe) -> None:
    def with_(**changes) -> Recipe:
        transformer = TransformerConfig(num_layers=3, width=16, num_heads=2, dropout=0.1, **changes)
        return on(dataclasses.replace(tiny_recipe, model=tiny_recipe.model.with_(transformer, 0.1)), "data=1")

    expected = steps(with_(unroll=True), 3, 1)
    np.testing.assert_allclose(steps(with_(unroll=False), 3, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(steps(with_(unroll=False, remat="full"), 3, 1), expected, rtol=1e-5)


def test_bfloat16_computation_stays_near_float32(tiny_recipe: Recipe) -> None:
    transformer = TransformerConfig(num_layers=2, width=16, num_heads=2, dtype="bfloat16")
    half = on(dataclasses.replace(tiny_recipe, model=tiny_recipe.model.with_(transformer, 0.0)), "data=1")
    whole = on(
        dataclasses.replace(
            tiny_recipe,
            model=tiny_recipe.model.with_(dataclasses.replace(transformer, dtype="float32"), 0.0),
        ),
        "data=1",
    )
    np.testing.assert_allclose(steps(half, 3, 1), steps(whole, 3, 1), rtol=2e-3)


def test_a_run_goes_on_with_fewer_devices(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """8 -> 4 -> 1 devices, tables and optimiser rows split differently each time."""
    recipe = dataclasses.replace(tiny_recipe, train_steps=9, log_every=1)
    train(on(recipe, "data=1"), tmp_path / "plain", devices=jax.devices()[:1])
    for last, mesh, preset, count in (
        (3, "data=4,model=2", "fsdp_model", 8),
        (6, "data=4", "fsdp", 4),
        (9, "", "data", 1),
    ):
        part = dataclasses.replace(on(recipe, mesh, preset), train_steps=last)
        train(part, tmp_path / "moved", devices=jax.devices()[:count])
    plain, moved = losses(tmp_path / "plain"), losses(tmp_path / "moved")
    assert list(moved) == list(plain) == list(range(1, 10))
    np.testing.assert_allclose(list(moved.values()), list(plain.values()), rtol=5e-5)


def test_a_truncated_newest_checkpoint_is_passed_over(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        on(tiny_recipe, "data=1"), train_steps=6, log_every=1, checkpoints=Checkpoints(every=2, keep_last=3)
    )
    one = jax.devices()[:1]
    train(recipe, tmp_path, devices=one)
    expected = losses(tmp_path)
    newest = sorted((tmp_path / CHECKPOINTS).iterdir())[-1]
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    with pytest.warns(RuntimeWarning, match="damaged"):
        train(recipe, tmp_path, devices=one)
    assert losses(tmp_path) == expected


def test_a_checkpoint_of_another_model_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe, one = on(tiny_recipe, "data=1"), jax.devices()[:1]
    train(recipe, tmp_path, devices=one)
    wider = tiny_recipe.model.with_(TransformerConfig(num_layers=2, width=32, num_heads=2), 0.0)
    with pytest.raises(CheckpointError, match="another model"):
        train(dataclasses.replace(recipe, model=wider), tmp_path, devices=one)


def test_a_folder_is_trained_in_by_one_process(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Two would write each other's checkpoints. That one which was killed keeps nobody out, kills of all kinds show."""
    with held(tmp_path / LOCK), pytest.raises(CheckpointError, match="another process trains in this folder"):
        train(on(tiny_recipe, "data=1"), tmp_path, devices=jax.devices()[:1])
    assert not (tmp_path / CHECKPOINTS).exists()


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_last_checkpoint(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    one = jax.devices()[:1]
    recipe = dataclasses.replace(on(tiny_recipe, "data=1"), checkpoints=Checkpoints(every=2))
    train(recipe, tmp_path, devices=one)
    before = sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir())
    worse = dataclasses.replace(
        recipe, train_steps=20, optimizer=Optimizer(kind="sgd", momentum=0.0, learning_rate=float("nan"))
    )
    worse_dir = tmp_path / "worse"
    with pytest.raises(TrainingError, match="batch 2") as error:
        train(worse, worse_dir, devices=one)
    assert "step 2" in str(error.value)
    assert sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir()) == before
    assert not list((worse_dir / CHECKPOINTS).glob("0*"))


def start(recipe_file: Path, workdir: Path, *more: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "recjax", "train", f"--gin_file={recipe_file}", f"--workdir={workdir}", *more]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


def test_a_killed_run_ends_as_if_it_had_not_been(tiny_gin: Path, tmp_path: Path) -> None:
    """kill -9 once at a random moment and once during a save; the loss curves are equal to the bit."""
    more = ("--gin.TRAIN_STEPS=40", "--gin.checkpoint.Checkpoints.every=3", "--gin.recipe.Recipe.log_every=1")
    finish(start(tiny_gin, tmp_path / "plain", *more))
    killed = tmp_path / "killed"
    chance = random.Random(os.urandom(8))

    def lines() -> int:
        file = killed / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def is_saving() -> bool:
        return any((killed / CHECKPOINTS).glob(".saving-*"))

    least = chance.randrange(2, 12)
    for moment in (lambda: lines() >= least, lambda: lines() >= least + 8 and is_saving()):
        process = start(tiny_gin, killed, *more)
        while process.poll() is None and not moment():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(tiny_gin, killed, *more))
    assert losses(killed) == losses(tmp_path / "plain")
    assert len(losses(killed)) == 40


def test_a_run_told_to_stop_saves_first(tiny_gin: Path, tmp_path: Path) -> None:
    process = start(tiny_gin, tmp_path, "--gin.TRAIN_STEPS=100000", "--gin.recipe.Recipe.log_every=1")
    while process.poll() is None and not losses_so_far(tmp_path):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors.decode()[-3000:]
    assert list((tmp_path / CHECKPOINTS).glob("0*"))


def losses_so_far(workdir: Path) -> bool:
    file = workdir / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def test_two_processes_train_the_curve_of_one(tiny_gin: Path, tmp_path: Path) -> None:
    more = ("--gin.TRAIN_STEPS=6", "--gin.recipe.Recipe.log_every=1")
    finish(start(tiny_gin, tmp_path / "one", *more))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = {"RECJAX_COORDINATOR": f"localhost:{port}", "RECJAX_NUM_PROCESSES": "2"}
    processes = [start(tiny_gin, tmp_path / "two", *more, **both, RECJAX_PROCESS_ID=str(i)) for i in range(2)]
    for process in processes:
        finish(process)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 7))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-5)
