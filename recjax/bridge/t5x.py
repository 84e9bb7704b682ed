"""Checkpoints of T5X, as `t5x.checkpoints` lays them down.

    checkpoint_1000000/
      checkpoint                                  msgpack: {"version": 3, "optimizer": {"target": ..., "state": ...}}
      target.encoder.layers_0.attention.key.kernel/   zarr, read through TensorStore

A leaf of the msgpack tree is an array, or the specification of a TensorStore array whose path is relative to the
folder, whatever file system it was written to. Of the state of the optimiser nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from flax import serialization

from recjax.bridge.tensors import Tensors
from recjax.core.errors import CheckpointError

FILE = "checkpoint"


def open_t5x(path: Path) -> Tensors:
    """The parameters of a checkpoint by "/"-joined path; raises `CheckpointError` when it cannot be read."""
    file = path / FILE
    try:
        contents = serialization.msgpack_restore(file.read_bytes())
        target = contents["optimizer"]["target"]
    except FileNotFoundError:
        raise CheckpointError("there is no T5X checkpoint here", where=str(path), expected=f"a file {FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read this as a T5X checkpoint: {error!r}",
            where=str(file),
            expected='msgpack with "optimizer" / "target", as T5X wrote it before it took to orbax',
        ) from error
    leaves = dict(_leaves(target, ()))
    shapes = {name: _shape(leaf) for name, leaf in leaves.items()}

    def read(name: str) -> np.ndarray:
        leaf = leaves[name]
        return leaf if isinstance(leaf, np.ndarray) else _read(path, name, leaf)

    return Tensors(path, shapes, read)


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping) or _is_spec(tree):
        yield "/".join(path), tree
        return
    for name, node in tree.items():
        yield from _leaves(node, (*path, name))


def _is_spec(value: Mapping[str, Any]) -> bool:
    return {"driver", "kvstore", "metadata"} <= set(value)


def _shape(leaf: Any) -> tuple[int, ...]:
    shape = leaf["metadata"]["shape"] if isinstance(leaf, Mapping) else np.shape(leaf)
    return tuple(int(n) for n in shape)


def _read(folder: Path, name: str, spec: Mapping[str, Any]) -> np.ndarray:
    store = spec["kvstore"]
    relative = spec.get("path") or (store.get("path") if isinstance(store, Mapping) else None) or name.replace("/", ".")
    place = folder / str(relative).strip("/")
    try:
        opened = tensorstore.open(
            {"driver": spec["driver"], "kvstore": {"driver": "file", "path": f"{place}/"}}, open=True, read=True
        ).result()
        found = np.asarray(opened.read().result())
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"cannot read {name}: {str(error).splitlines()[0]}", where=str(place), mend="copy the checkpoint again"
        ) from error
    if found.shape != _shape(spec):
        raise CheckpointError(f"{name} has shape {found.shape}", where=str(place), expected=str(_shape(spec)))
    return found
