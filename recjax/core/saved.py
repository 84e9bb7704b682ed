"""One checkpoint on disk: what lies in its folder, whether it is whole, and whether it fits the model at hand.

    000001000/
      state/            the arrays, an orbax tree named by the path of each leaf ("params/...", "opt_state/...")
      checkpoint.json   the rest: data position, metrics, and what the arrays belong to (`Record`)
      files.json        size and SHA-256 of every file above

A folder is made under another name and renamed when complete, so a folder named by a step is a finished one unless
something damaged it later. Arrays are named by path and not by the classes that held them, so a checkpoint can be
read by whoever knows the names. Folders are on a local or mounted file system (`core.mirror` takes them to a URL);
which of them to keep or to restore is for `core.checkpoint` to say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from recjax.core import folder
from recjax.core.errors import CheckpointError
from recjax.core.state import by_path, from_paths, nested

FORMAT = 1
STATE, RECORD, FILES = "state", "checkpoint.json", "files.json"
PARAMS, AVERAGE = "params/", "opt_state/average/"  # where `state.TrainState` and `optim.AverageState` put them

Signature = dict[str, tuple[str, tuple[int, ...]]]


class Damaged(Exception):
    """A checkpoint that cannot be trusted; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint says of itself.

    `vocabulary` is the hash of the item vocabulary, `signature` the dtype and shape of every array by path, and
    `iterator` the position in the data as its iterator gave it.
    """

    step: int
    recipe: str
    vocabulary: str
    recjax: str
    signature: Signature
    metrics: Mapping[str, float]
    iterator: Any


def name_of(step: int) -> str:
    """The folder of a step."""
    return f"{step:09d}"


def steps(directory: Path) -> list[int]:
    """The steps that have a folder, oldest first; none when there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(int(child.name) for child in directory.iterdir() if re.fullmatch(r"\d{9,}", child.name))


def belongs(name: str) -> str:
    """The checkpoint, a folder, that a file of this name is part of; "" where it is not of a checkpoint."""
    found = re.match(r"((?:.*/)?\d{9,})/", name)
    return found[1] if found else ""


def unfinished(names: Iterable[str]) -> list[str]:
    """Those of the names of files that are of checkpoints without their list of files, which is written last."""
    known = set(names)
    return [name for name in known if belongs(name) and f"{belongs(name)}/{FILES}" not in known]


def signature(tree: Any) -> Signature:
    """dtype and shape by path of a tree of arrays or shapes."""
    return {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in by_path(tree).items()}


def seal(path: Path, record: Record) -> None:
    """Write the record and the list of files into a folder that already holds the arrays."""
    _write_json(path / RECORD, {"format": FORMAT, **dataclasses.asdict(record)})
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    _write_json(path / FILES, sizes)


def read(path: Path) -> Record:
    """The record of a checkpoint; raises `Damaged` when it cannot be read."""
    value = _read_json(path / RECORD)
    try:
        if value["format"] != FORMAT:
            raise Damaged(f"{RECORD} has format {value['format']!r}, not {FORMAT}")
        fields = {field.name: value[field.name] for field in dataclasses.fields(Record)}
        fields["signature"] = {p: (str(dtype), tuple(shape)) for p, (dtype, shape) in value["signature"].items()}
        return Record(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{RECORD} lacks something: {error!r}") from error


def check(path: Path, *, verify: bool = True) -> Record:
    """The record of a checkpoint of which every file is as it was written; raises `Damaged` otherwise.

    Without `verify` the files are not read, and only their sizes compared.
    """
    record, files = read(path), _read_json(path / FILES)
    try:
        folder.check_files(path, {"files": files}, verify=verify, error=CheckpointError)
    except CheckpointError as error:
        raise Damaged(error.what) from error
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"cannot compare it with {FILES}: {error!r}") from error
    if record.step != int(path.name):
        raise Damaged(f"{RECORD} is of step {record.step}")
    return record


def looks_whole(path: Path) -> bool:
    """Whether every file is there in its size."""
    try:
        check(path, verify=False)
    except Damaged:
        return False
    return True


def load(path: Path, target: Any) -> Any:
    """The arrays at the paths of `target`, whose leaves are `jax.ShapeDtypeStruct`s with their shardings.

    Paths of the checkpoint that `target` lacks are not read; dtypes are converted. Raises whatever orbax raises.
    """
    tree = nested(by_path(target))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            path / STATE,
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            ),
        )
    return from_paths(target, by_path(restored))


def params_of(record: Record) -> dict[str, str]:
    """The path of each parameter, and the path in the checkpoint of what to evaluate it with.

    That is the average of the weight where one was kept.
    """
    names = [path.removeprefix(PARAMS) for path in record.signature if path.startswith(PARAMS)]
    return {name: (AVERAGE if AVERAGE + name in record.signature else PARAMS) + name for name in names}


def differences(saved: Signature, wanted: Signature) -> list[str]:
    """One line for every array that only one of the two has, or that differs."""
    lines = [f"missing from the checkpoint: {p} {form(wanted[p])}" for p in wanted if p not in saved]
    lines += [f"unexpected in the checkpoint: {p} {form(saved[p])}" for p in saved if p not in wanted]
    lines += [
        f"different: {p} is {form(saved[p])} in the checkpoint and {form(wanted[p])} here"
        for p in wanted
        if p in saved and saved[p] != wanted[p]
    ]
    return lines


def check_fit(record: Record, wanted: Signature, vocabulary: str, where: Path) -> None:
    """Raise `CheckpointError` with every difference when a checkpoint is of another vocabulary or model."""
    problems: dict[str, list[str]] = {}
    if vocabulary and record.vocabulary != vocabulary:
        problems["vocabulary"] = [f"item vocabulary {record.vocabulary!r} in the checkpoint and {vocabulary!r} here"]
    lines = differences(record.signature, wanted)
    in_params = [line for line in lines if f": {PARAMS}" in line]
    if lines:  # what differs in the parameters differs in the optimiser's slots too: once is enough
        problems["model" if in_params else "optimiser"] = in_params or lines
    if problems:
        raise CheckpointError(
            f"the checkpoint is of another {' and '.join(problems)}:\n    " + "\n    ".join(sum(problems.values(), [])),
            where=f"{where} (recipe {record.recipe!r}, recjax {record.recjax})",
            mend="train in a new workdir, go back to the recipe and data of this one, or warm start from it",
        )


def form(leaf: tuple[str, tuple[int, ...]]) -> str:
    """How an array is written in a message: float32[16,4]."""
    return f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as opened:
        json.dump(value, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from error


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
