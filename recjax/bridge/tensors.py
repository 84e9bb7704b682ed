"""Folders of named arrays that other people's programs write: looked into first, then read one array at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recjax.core import folder
from recjax.core.errors import CheckpointError

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Arrays by name: their shapes, known at once, and a function that reads one of them.

    `where` is the folder, `config` what it says of the model, if it says anything.
    """

    where: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, wanted: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Raise `CheckpointError` with every array that is missing, too many, or of another shape than `wanted`."""
        lines = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in self.shapes]
        lines += [
            f"unexpected: {name} {shape}"
            for name, shape in self.shapes.items()
            if name not in wanted and name not in set(ignored)
        ]
        lines += [
            f"different: {name} is {self.shapes[name]}, not {shape}"
            for name, shape in wanted.items()
            if self.shapes.get(name, shape) != shape
        ]
        refuse(lines, self.where)


def refuse(lines: list[str], where: Path) -> None:
    """Raise `CheckpointError` when there are `lines` of differences."""
    if lines:
        raise CheckpointError(
            "this checkpoint is of another model:\n    " + "\n    ".join(lines),
            where=str(where),
            expected="T5 1.1 (such as Flan-T5), Llama, Mistral, Mixtral, Qwen2, Qwen3, or for sentence vectors a BERT",
        )


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a folder."""
    return _json(path / CONFIG)


def open_safetensors(path: Path) -> Tensors:
    """A folder of Hugging Face: `config.json` and `model.safetensors`, or an index and the files that it names."""
    config = read_config(path)
    index = path / INDEX
    names = set(_json(index).get("weight_map", {}).values()) if index.is_file() else {ONE_FILE}
    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(names):
        for tensor, shape in _look(path / name):
            place[tensor], shapes[tensor] = path / name, shape

    def read(name: str) -> np.ndarray:
        with safe_open(place[name], "np") as opened:
            return opened.get_tensor(name)

    return Tensors(path, shapes, read, config)


def write_safetensors(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    *,
    dtype: np.dtype,
    shard_bytes: int,
    files: Sequence[Path] = (),
) -> None:
    """A new folder as `open_safetensors` reads it, and Hugging Face; no file is larger than `shard_bytes` if possible.

    `tensors` are the shape of each and what makes it, which is called when the file that it is part of is written: no
    more than one file is in memory. `files` are copied beside them. Raises `CheckpointError` when `out` exists.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, (shape, _) in tensors.items():
        needed = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and size + needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    shard_files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with folder.new_folder(out, error=CheckpointError) as new:
        for file, names in zip(shard_files if len(shards) > 1 else [ONE_FILE], shards, strict=True):
            arrays = {name: np.ascontiguousarray(tensors[name][1]().astype(dtype)) for name in names}
            save_file(arrays, new / file, metadata={"format": "pt"})
        if len(shards) > 1:
            places = {name: file for file, names in zip(shard_files, shards, strict=True) for name in names}
            total = sum(int(np.prod(shape)) for shape, _ in tensors.values()) * dtype.itemsize
            _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        _write_json(new / CONFIG, config)
        for file in files:
            shutil.copyfile(file, new / file.name)


def _look(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, tuple(opened.get_slice(name).get_shape())
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing", where=str(file.parent)) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read this file: {error}", where=str(file), mend="copy it again") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing", where=str(file.parent)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read this file: {error}", where=str(file), mend="copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object", where=str(file.parent))
    return value


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
