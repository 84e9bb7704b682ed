"""Arrays of the host reach a checkpoint one at a time, uncopied and unchanged."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import type_handlers

from recjax.core import host_arrays

TREE = {f"layer{k}": np.random.default_rng(k).normal(size=(64, 8 + k)).astype(np.float32) for k in range(6)}


def save(path: Path, tree: dict[str, Any]) -> None:
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=host_arrays.handlers())) as writer:
        for turn in range(2):  # each save has an event loop of its own
            writer.save(path / str(turn), args=ocp.args.PyTreeSave(tree))
            writer.wait_until_finished()


def test_each_is_written_when_the_one_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen, now, most = type_handlers.NumpyHandler._open_and_write, [], 0, 0

    async def watched(self: Any, value: np.ndarray, *args: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        seen.append(value)
        await asyncio.sleep(0.01)
        await write(self, value, *args)
        now -= 1

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", watched)
    save(tmp_path, TREE)
    assert most == 1 and len(seen) == 2 * len(TREE)
    assert all(any(np.shares_memory(one, mine) for mine in TREE.values()) for one in seen)


def test_numbers_are_saved_as_well(tmp_path: Path) -> None:
    save(tmp_path, {"step": np.int32(7), "rate": 0.5, "count": 3})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        assert reader.restore(tmp_path / "1") == {"step": 7, "rate": 0.5, "count": 3}


def test_what_is_read_is_what_lay_in_the_files(tmp_path: Path) -> None:
    mapped = {}
    for name, array in TREE.items():
        mapped[name] = np.memmap(tmp_path / name, np.float32, "w+", shape=array.shape)
        mapped[name][...] = array
    save(tmp_path, mapped)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(tmp_path / "1")
    assert set(found) == set(TREE)
    for name, array in TREE.items():
        np.testing.assert_array_equal(found[name], array)
