"""Prepared examples, made once and found again by what they were made from.

A task's folder is named after the task and a hash of its settings, its data and the format, so that a change of any of
them is another folder and nothing is ever overwritten. A folder appears whole or not at all; a lock keeps two
processes from doing the same work, and where a file system has no locks the first to finish wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recjax.core import errors
from recjax.core.errors import ExamplesError, RecjaxError
from recjax.core.progress import Progress
from recjax.data.examples import FORMAT, Examples, write_examples
from recjax.data.identity import source_hash
from recjax.data.sources import DataDir
from recjax.tasks.mixtures import Mixture
from recjax.tasks.work import Task, columns_of, count

ERROR_FILE = "error.json"


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where prepared examples are kept: the argument, else RECJAX_CACHE, else ~/.cache/recjax."""
    return Path(cache or os.environ.get("RECJAX_CACHE") or "~/.cache/recjax").expanduser()


def examples_path(task: Task, cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds, or will hold, the examples of a task. Raises `DataError` when there is no data."""
    return cache_root(cache) / f"{task.name}-{content_hash(task)[:12]}"


def content_hash(task: Task) -> str:
    """Hexadecimal digits of the settings of a task, its data (wherever it lies) and the format of examples."""
    told = {"task": described(task), "source": source_hash(task.data), "format": FORMAT}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def described(value: Any) -> Any:
    """A settings object as JSON; where data lies is left out, because only what it holds matters."""
    if isinstance(value, DataDir):
        source = {"columns": described(value.columns)}
        return source if value.path else {**source, "simulate": described(value.simulate)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [described(v) for v in value]
    return value


def prepare(mixture: Mixture, cache: str | os.PathLike[str] | None = None) -> list[Path]:
    """Make the examples of every task that are not there yet; the folders of all tasks.

    Raises `ExamplesError` when a folder is damaged, or when something is to be made where TensorFlow or seqio is
    missing, and `DataError` when the data cannot be used.
    """
    paths = []
    for task in mixture.tasks:
        path = examples_path(task, cache)
        if not path.exists():
            _make(task, path)
        paths.append(Examples.open(path).path)
    return paths


def ensure_prepared(mixture: Mixture, cache: str | os.PathLike[str] | None = None) -> list[Examples]:
    """The examples of every task; what is missing is made by another process.

    This process stays without TensorFlow. Raises what `prepare` raises.
    """
    paths = [examples_path(task, cache) for task in mixture.tasks]
    if not all(path.exists() for path in paths):
        cache_root(cache).mkdir(parents=True, exist_ok=True)
        with _locked(cache_root(cache) / ".prepare.lock"):
            if not all(path.exists() for path in paths):
                _prepare_elsewhere(mixture, cache_root(cache))
    return [Examples.open(path) for path in paths]


def run_specification(folder: Path, cache: Path) -> int:
    """The other end of `ensure_prepared`: prepare the mixture in `folder`, leaving a mistake there as a file."""
    try:
        prepare(pickle.loads((folder / "mixture.pickle").read_bytes()), cache)
    except RecjaxError as error:
        fields = {k: getattr(error, k) for k in ("what", "where", "expected", "mend")}
        (folder / ERROR_FILE).write_text(json.dumps({"class": type(error).__name__, **fields}))
        return 2
    return 0


def _prepare_elsewhere(mixture: Mixture, cache: Path) -> None:
    from recjax.tasks.seqio_bridge import check_available

    check_available()
    package_root = str(Path(errors.__file__).parents[2])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="recjax-prepare-") as name:
        folder = Path(name)
        (folder / "mixture.pickle").write_bytes(pickle.dumps(mixture))
        command = [sys.executable, "-m", "recjax.prepare", f"--specification={folder}", f"--cache={cache}"]
        status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
        if (folder / ERROR_FILE).exists():
            told = json.loads((folder / ERROR_FILE).read_text())
            raise getattr(errors, told.pop("class"))(told.pop("what"), **told)
    if status:
        raise ExamplesError(
            f"preparing the examples ended with status {status}",
            where=" ".join(command[1:3]),
            mend="see the messages above; `recjax prepare` with the same recipe shows them again",
        )


def _make(task: Task, path: Path) -> None:
    from recjax.tasks.seqio_bridge import check_available, materialise, seqio_task

    check_available()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed: nobody else is here
            shutil.rmtree(leftover, ignore_errors=True)
        work = task.work()
        facts = {
            "task": task.name,
            "config": described(task),
            "source_hash": source_hash(task.data),
            "content_hash": content_hash(task)[:16],
            **work.facts,
        }
        try:
            with write_examples(path, vocab=work.vocab, items=work.items, users=work.users, facts=facts) as writer:
                converted = seqio_task(work)
                for split, schema in work.schemas.items():
                    writer.add(split, schema, columns_of([], schema))
                    total = count(work.raw[split])
                    with Progress(f"{task.name}: {split}", total=total, unit="users") as progress:
                        for columns in materialise(converted, split):
                            writer.add(split, schema, columns)
                            progress.update(writer.examples(split))
                        progress.update(total, examples=f"{writer.examples(split):,}")
        except ExamplesError:
            if not path.exists():  # else another process, unseen by the lock, was first; its folder serves as well
                raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds this lock; the system lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        # Some network file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
