"""The checkpoints of a run: saving beside the training, keeping the newest and the best, resuming from a whole one.

orbax writes and reads the arrays, without holding up training and onto whatever devices there are. What a
checkpoint is beyond its arrays, and when it counts as one, is decided here: it is written under another name,
sealed with the sizes and hashes of its files (`core.saved`), and appears by a rename. Killing the process at any
moment leaves at most an unfinished folder, which the next run clears away. A damaged checkpoint is passed over for
the one before, which is never deleted for its sake; one of another model or vocabulary never is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import recjax
from recjax.core import host_arrays, saved
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.module import Params
from recjax.core.saved import Damaged, Record
from recjax.core.state import TrainState, by_path, from_paths

_UNFINISHED = (".saving-", ".deleting-")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Save every `every` steps and at the end; keep the `keep_last` newest and the `keep_best` best.

    Best is the highest (`mode` "max") or lowest ("min") value of `metric` among the metrics given to `save`; without
    a `metric` only the newest are kept.
    """

    every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    metric: str = ""
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or self.keep_best < 0 or self.mode not in ("max", "min"):
            raise ConfigError(
                "checkpoints cannot be kept like this",
                where=repr(self),
                expected="every and keep_last at least 1, keep_best at least 0, mode 'max' or 'min'",
            )

    def ranked(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that have a finite `metric`, best first; the newer of two equals first."""
        sign = -1 if self.mode == "max" else 1
        values = {step: m[self.metric] for step, m in metrics.items() if math.isfinite(m.get(self.metric, math.nan))}
        return sorted(values, key=lambda step: (sign * values[step], -step))


class Restored(NamedTuple):
    """A state, the position in the data that belongs to it, and the checkpoint's record."""

    state: TrainState
    iterator: Any
    record: Record


class Checkpointer:
    """The checkpoints of one training run in `directory`; every process makes one, and calls it in step.

    `recipe` and `vocabulary` (the hash of the item vocabulary) are written into each checkpoint; a checkpoint with
    another vocabulary is refused. Saving goes on in the background: an error of it is raised, as `CheckpointError`,
    by the next call of `save`, `check` or `wait`, and leaves the earlier checkpoints as they were.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: Checkpoints, *, recipe: str = "", vocabulary: str = ""
    ) -> None:
        self._directory = Path(directory).absolute()
        self._config, self._recipe, self._vocabulary = config, recipe, vocabulary
        self._is_lead = jax.process_index() == 0
        self._finishing: threading.Thread | None = None
        self._error: CheckpointError | None = None
        if self._is_lead:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"cannot make the folder for checkpoints: {error}", where=str(directory)
                ) from error
            for child in self._directory.iterdir():
                if child.name.startswith(_UNFINISHED):
                    shutil.rmtree(child, ignore_errors=True)
        self._metrics = _metrics(self._directory)
        self._writer = _writer()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def due(self, step: int, *, is_last: bool = False, metrics: Mapping[str, float] | None = None) -> bool:
        """Whether to save now: the interval has come round, the run ends, or `metrics` would be among the best."""
        if step in self._metrics:
            return False
        best = self._config.ranked({**self._metrics, step: metrics or {}})[: self._config.keep_best]
        return is_last or step % self._config.every == 0 or step in best

    def save(self, state: TrainState, *, iterator: Any = None, metrics: Mapping[str, float] | None = None) -> None:
        """Begin to save; returns when the arrays have been copied, so that they may be donated.

        Those of numpy are not copied, and must stay as they are until `wait` (`core.host_arrays`).

        `iterator` is anything JSON can hold, and describes the data after `state.step` steps. Waits for the save
        before this one. A step that already has a checkpoint is not saved again.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        if step in self._metrics:
            return
        record = Record(
            step=step,
            recipe=self._recipe,
            vocabulary=self._vocabulary,
            recjax=recjax.__version__,
            signature=saved.signature(state),
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            iterator=json.loads(json.dumps(iterator)),  # a copy as of now
        )
        temporary = self._directory / f".saving-{saved.name_of(step)}"
        try:
            if self._is_lead:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self._writer.save(temporary / saved.STATE, args=ocp.args.PyTreeSave(saved.nested(by_path(state))))
        except Exception as error:
            raise self._failed(step, temporary, error) from error
        self._metrics[step] = record.metrics
        self._finishing = threading.Thread(target=self._finish, args=(record, temporary), name="checkpoint")
        self._finishing.start()

    def check(self) -> None:
        """Raise the error of a save that failed in the background, if there is one; costs nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the save under way; raises its error."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        self.check()

    def close(self) -> None:
        """Wait, then let go of all threads; raises the error of the last save."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def restore(self, target: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, laid out as `target` says (`state.abstract`); None when there is none.

        Damaged checkpoints are put aside under another name, with a warning each. Raises `CheckpointError` when
        there are checkpoints but no whole one, and when the newest whole one does not fit `target` or vocabulary.
        """
        self.wait()

        def restore(path: Path, record: Record) -> Restored:
            saved.check_fit(record, saved.signature(target), self._vocabulary, path)
            return Restored(saved.load(path, target), record.iterator, record)

        steps = saved.steps(self._directory)
        found = _first_whole(self._directory, steps[::-1], restore, put_aside=True)
        # Not what is newer: whether a process still sees what was put aside is up to the file system, but all of
        # them must come to the same answers in `due` and `save`.
        last = -1 if found is None else found.record.step
        self._metrics = {step: metrics for step, metrics in _metrics(self._directory).items() if step <= last}
        return found

    def _finish(self, record: Record, temporary: Path) -> None:
        """In the background: wait for the arrays, seal the folder, give it its name, delete what is not kept."""
        try:
            self._writer.wait_until_finished()
            if self._is_lead:
                saved.seal(temporary, record)
                final = self._directory / saved.name_of(record.step)
                _sync(temporary)
                temporary.rename(final)
                _sync(self._directory)
        except Exception as error:
            self._metrics.pop(record.step, None)
            self._error = self._failed(record.step, temporary, error)
            return
        best = self._config.ranked(self._metrics)[: self._config.keep_best] if self._config.metric else []
        keep = {record.step, *best, *sorted(self._metrics)[-self._config.keep_last :]}
        for step in [step for step in self._metrics if step not in keep]:
            del self._metrics[step]
        if self._is_lead:
            _collect(self._directory, keep)

    def _failed(self, step: int, temporary: Path, error: Exception) -> CheckpointError:
        with contextlib.suppress(Exception):  # the same error once more
            self._writer.close()
        self._writer = _writer()  # the old one keeps errors for the next save
        if self._is_lead:
            shutil.rmtree(temporary, ignore_errors=True)
        steps = saved.steps(self._directory)
        return CheckpointError(
            f"could not save the checkpoint of step {step}: {error}",
            where=str(self._directory),
            expected="room and permission to write",
            mend=f"mend the disk and start again: the run goes on from step {steps[-1]}" if steps else "mend the disk",
        )


def restore_params(
    directory: str | os.PathLike[str], target: Params, *, step: int | str = "newest", vocabulary: str = ""
) -> tuple[Params, Record]:
    """The parameters for evaluation and export, laid out as `target` says, and the record of their checkpoint.

    The average of the weights is taken where one was kept. `step` is a number, "newest", or the name of a metric,
    prefixed by "max:" or "min:", for the best by it. Raises `CheckpointError` when there is no such checkpoint, when
    it is damaged, or of another model or vocabulary. Only reads.
    """

    def restore(path: Path, record: Record) -> tuple[Params, Record]:
        params = {p: f for p, f in record.signature.items() if p.startswith(saved.PARAMS)}
        wanted = {saved.PARAMS + p: leaf for p, leaf in saved.signature(target).items()}
        saved.check_fit(dataclasses.replace(record, signature=params), wanted, vocabulary, path)
        stored = saved.params_of(record)
        arrays = by_path(saved.load(path, saved.nested({stored[p]: leaf for p, leaf in by_path(target).items()})))
        return from_paths(target, {p: arrays[stored[p]] for p in by_path(target)}), record

    return read_checkpoint(directory, step, restore)


def read_checkpoint(directory: str | os.PathLike[str], step: int | str, read: Callable[[Path, Record], T]) -> T:
    """`read(folder, record)` of the checkpoint that `step` chooses, as in `restore_params`; "newest" means whole."""
    path = Path(directory).absolute()
    found = _first_whole(path, _choose(path, step), read, put_aside=False)
    if found is None:
        known: list[Any] = saved.steps(path)
        if isinstance(step, str) and ":" in step:
            known = sorted({metric for metrics in _metrics(path).values() for metric in metrics})
        names = ", ".join(map(str, known)) or "none"
        raise CheckpointError(f"there is no checkpoint {step!r}", where=str(path), expected=f"one of: {names}")
    return found


def _writer() -> ocp.AsyncCheckpointer:
    # Errors reach the user as one `CheckpointError`; orbax logs each several times, with tracebacks.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=host_arrays.handlers()))


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _choose(directory: Path, step: int | str) -> list[int]:
    """The steps to try, in order."""
    steps = saved.steps(directory)
    if step == "newest":
        return steps[::-1]
    if isinstance(step, int):
        return [step] if step in steps else []
    mode, _, metric = step.partition(":")
    if mode not in ("max", "min") or not metric:
        raise CheckpointError(f"cannot choose a checkpoint by {step!r}", expected='a step, "newest" or "max:metric"')
    return Checkpoints(metric=metric, mode=mode).ranked(_metrics(directory))[:1]


def _first_whole(directory: Path, steps: list[int], read: Callable[[Path, Record], T], *, put_aside: bool) -> T | None:
    """`read` of the first of `steps` that is whole, the same on every process; None when there are no steps."""
    damaged: dict[Path, str] = {}
    for step in _agreed(steps):
        path = directory / saved.name_of(step)
        reason, record = _inspect(path)
        if record is not None:
            try:
                found = read(path, record)
            except CheckpointError:
                raise
            except Exception as error:  # orbax and tensorstore have no common ancestor
                reason = f"the arrays cannot be read: {error!r}"
            else:
                # Only now: when nothing can be read the fault may lie elsewhere, such as in too little memory.
                if put_aside and jax.process_index() == 0:
                    for bad in damaged:
                        _put_aside(bad)
                return found
        damaged[path] = reason
        warnings.warn(f"checkpoint {path} is damaged and passed over: {reason}", RuntimeWarning, stacklevel=3)
    if damaged:
        raise CheckpointError(
            "every checkpoint is damaged:\n    "
            + "\n    ".join(f"{path.name}: {why}" for path, why in damaged.items()),
            where=str(directory),
            mend="bring back a copy of one, or train again in a new workdir",
        )
    return None


def _inspect(path: Path) -> tuple[str, Record | None]:
    """Why the checkpoint is damaged, or its record; process 0 looks and the others believe it."""
    reason, record = "", None
    if jax.process_index() == 0:
        try:
            record = saved.check(path)
        except Damaged as error:
            reason = str(error)
    if jax.process_count() > 1:
        is_whole = bool(multihost_utils.broadcast_one_to_all(np.asarray(record is not None)))
        record = (record or saved.read(path)) if is_whole else None
    return reason or "process 0 found it damaged", record


def _agreed(steps: list[int]) -> list[int]:
    """The steps as process 0 sees them: a file system need not show every process the same at once."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps))))
    mine = np.zeros(count, np.int32)
    mine[: len(steps)] = steps[:count]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)]


def _metrics(directory: Path) -> dict[int, Mapping[str, float]]:
    """The metrics that each checkpoint was saved with; none for one that cannot be read."""
    out: dict[int, Mapping[str, float]] = {}
    for step in saved.steps(directory):
        try:
            out[step] = saved.read(directory / saved.name_of(step)).metrics
        except Damaged:
            out[step] = {}
    return out


def _put_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _collect(directory: Path, keep: set[int]) -> None:
    """Delete the checkpoints not in `keep`; for each of those that has been damaged the newest whole one stays too.

    Looked at are the record and the size of every file; hashes are for restoring, which passes over what is damaged.
    """
    lost = sum(not saved.looks_whole(directory / saved.name_of(step)) for step in keep)
    for step in sorted(set(saved.steps(directory)) - keep, reverse=True):
        if lost and saved.looks_whole(directory / saved.name_of(step)):
            lost -= 1
        else:
            _delete(directory, step)


def _delete(directory: Path, step: int) -> None:
    """Rename first, so that a checkpoint that is half deleted does not look like one."""
    doomed = directory / f".deleting-{saved.name_of(step)}"
    with contextlib.suppress(OSError):
        (directory / saved.name_of(step)).rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
