"""A disk that fills up in the middle of a run: told in one message, and nothing of before is lost."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from orbax.checkpoint import AsyncCheckpointer

from recjax import cli
from recjax.core import saved
from recjax.core.checkpoint import Checkpoints
from recjax.core.sharding import MeshConfig
from recjax.core.writer import read_metrics
from recjax.recipe import Recipe
from recjax.train import CHECKPOINTS, train


def test_older_checkpoints_stay_and_training_goes_on_later(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / CHECKPOINTS
    recipe = dataclasses.replace(tiny_recipe, mesh=MeshConfig(shape="data=1"), checkpoints=Checkpoints(every=1))

    def verb(argv: list[str]) -> int:
        steps = int(argv[0])
        return int(
            train(dataclasses.replace(recipe, train_steps=steps), tmp_path, devices=jax.devices()[:1]).step != steps
        )

    def full(self: Any, directory: Path, *args: Any, **kwargs: Any) -> None:
        directory.mkdir()
        (directory / "half").write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert cli.run(verb, ["2"]) == 0
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(AsyncCheckpointer, "save", full)
        assert cli.run(verb, ["4"]) == 2
    said = capsys.readouterr().err
    assert "recjax: could not save the checkpoint of step 3: [Errno 28] No space left on device\n" in said
    assert "the run goes on from step 2" in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    assert cli.run(verb, ["4"]) == 0
    assert saved.steps(checkpoints) == [3, 4]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r] == [1, 2, 3, 4]
