"""Which checkpoints are deleted: never the last one that a run could go on from."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

from recjax.core import saved, state
from recjax.core.checkpoint import Checkpointer, Checkpoints


def state_at(step: int) -> state.TrainState:
    return state.TrainState(step=jnp.int32(step), params={"table": jnp.full((8, 4), float(step))}, opt_state=())


def cut(path: Path) -> None:
    """Truncate the largest file."""
    file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def save(directory: Path, *steps: int, keep: int) -> list[int]:
    with Checkpointer(directory, Checkpoints(keep_last=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step))
    return saved.steps(directory)


def restored(directory: Path) -> int:
    with Checkpointer(directory, Checkpoints()) as checkpoints:
        found = checkpoints.restore(state_at(0))
    assert found is not None
    return int(found.state.step)


@pytest.mark.parametrize("how", [cut, lambda path: (path / "files.json").unlink()])
def test_a_damaged_one_does_not_push_out_the_last_whole_one(tmp_path: Path, how) -> None:
    assert save(tmp_path, 1, 2, 3, keep=2) == [2, 3]
    how(tmp_path / saved.name_of(3))
    assert save(tmp_path, 4, keep=2) == [2, 3, 4]  # 3 cannot be gone on from, so 2 stays for it
    cut(tmp_path / saved.name_of(4))
    with pytest.warns(RuntimeWarning, match="damaged and passed over"):
        assert restored(tmp_path) == 2
    assert saved.steps(tmp_path) == [2]  # the damaged ones are put aside, not deleted
    assert len(list(tmp_path.glob("*.damaged"))) == 2
    assert save(tmp_path, 5, 6, keep=2) == [5, 6]


def test_of_two_damaged_ones_each_keeps_an_older_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=5)
    for step in (4, 5):
        cut(tmp_path / saved.name_of(step))
    assert save(tmp_path, 6, keep=3) == [2, 3, 4, 5, 6]
