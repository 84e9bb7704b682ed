"""What a run leaves in its workdir besides checkpoints, and what it shows meanwhile.

    metrics.jsonl          one JSON object a line: {"step": 100, "train/loss": 6.125}; floats come back bit by bit
    tensorboard/           the same as TensorBoard events
    manifest.json          what was run, with what, on what
    config.gin, operative_config.gin

Only process 0 writes. A resumed run first drops the lines past the step it resumes from, so that a run that was
killed leaves the same metrics as one that was not.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import recjax
from recjax.core.clock import Clock, kept_until
from recjax.core.config import Snapshot
from recjax.core.progress import Progress

METRICS, MANIFEST, EVENTS = "metrics.jsonl", "manifest.json", "tensorboard"
CONFIG, OPERATIVE = "config.gin", "operative_config.gin"
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "polars")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class StepMetrics(NamedTuple):
    """The metrics of one step on the host; `seconds` since the step before it was put, `waited` as given."""

    step: int
    values: dict[str, float]
    seconds: float
    waited: float


class LateMetrics:
    """Holds the metrics of a step on the device until the next step is under way.

    Fetching a number waits until it has been computed; fetched one step late, the device has the next step to work
    on meanwhile.
    """

    def __init__(self) -> None:
        self._held: tuple[int, Mapping[str, Any], float, float] | None = None
        self._last_put = time.perf_counter()

    def put(self, step: int, metrics: Mapping[str, Any], waited: float = 0.0) -> StepMetrics | None:
        """Take the device metrics of `step`, just dispatched; returns those of the step put before it."""
        now = time.perf_counter()
        for value in jax.tree.leaves(metrics):
            value.copy_to_host_async()
        earlier = self.flush()
        self._held = (step, metrics, now - self._last_put, waited)
        self._last_put = now
        return earlier

    def flush(self) -> StepMetrics | None:
        """The metrics not returned yet, once they are computed."""
        if self._held is None:
            return None
        step, metrics, seconds, waited = self._held
        self._held = None
        return StepMetrics(step, {k: float(v) for k, v in jax.device_get(dict(metrics)).items()}, seconds, waited)


class RunWriter:
    """Writes and shows the metrics of one run in `workdir`, which goes on from `first_step` (0 for a new one).

    `clock` knows of the starts before this one.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, first_step: int, total_steps: int, name: str = "train"
    ) -> None:
        self._workdir, self._first_step = Path(workdir), first_step
        self._is_lead = jax.process_index() == 0
        self.clock = Clock(began=time.time())
        if not self._is_lead:
            return
        from tensorboardX import SummaryWriter

        self._workdir.mkdir(parents=True, exist_ok=True)
        drop_after(self._workdir / METRICS, first_step)
        self.clock = Clock(began=self._began(), kept=self._kept())
        self._lines = open(self._workdir / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._events = SummaryWriter(str(self._workdir / EVENTS), purge_step=first_step + 1 if first_step else None)
        self._progress = Progress(name, total=total_steps, start=first_step)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def describe(self, facts: Mapping[str, Any], snapshot: Snapshot | None = None) -> None:
        """Write `manifest.json`: `facts`, the environment and the earlier starts of this run; and its config."""
        if not self._is_lead:
            return
        path = self._workdir / MANIFEST
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier", []), before]
        except (OSError, ValueError, AttributeError):
            earlier = []
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest = {**facts, "first_step": self._first_step, "started": now, **environment(), "earlier": earlier}
        write_text(path, json.dumps(manifest, indent=1, default=str) + "\n")
        if snapshot is not None:
            write_text(self._workdir / CONFIG, snapshot.config)
            write_text(self._workdir / OPERATIVE, snapshot.operative)

    def _began(self) -> float:
        """When this run was first started, in seconds since 1970: now, if nothing is left of a start before."""
        try:
            manifest = json.loads((self._workdir / MANIFEST).read_text(encoding="utf-8"))
            first = [*manifest.get("earlier", []), manifest][0]["started"]
            return datetime.datetime.fromisoformat(first).timestamp()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return time.time()

    def _kept(self) -> float:
        path = self._workdir / METRICS
        return kept_until(read_metrics(path), self._first_step) if path.exists() else 0.0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line to `metrics.jsonl` and points to TensorBoard."""
        if not self._is_lead:
            return
        values = {name: float(value) for name, value in metrics.items()}
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **shown}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def progress(self, step: int, **fields: float | str) -> None:
        """Show that `step` is done, and `fields` such as loss=6.12 beside the rate and the time left."""
        if self._is_lead:
            self._progress.update(step, **fields)

    def message(self, text: str) -> None:
        """Show a line that stays."""
        if self._is_lead:
            self._progress.message(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self._is_lead:
            self._progress.close()
            self._lines.close()
            self._events.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, up to one that was cut short; what is not finite comes back as a float too."""
    out = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        out.append({name: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for name, v in record.items()})
    return out


def drop_after(path: Path, step: int) -> None:
    """Drop the lines of a `metrics.jsonl` past `step`, and one that was cut short, all or nothing."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = read_metrics(path)
    kept = [line for line, record in zip(lines, records, strict=False) if record.get("step", math.inf) <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def environment() -> dict[str, Any]:
    """Versions and devices, for manifests."""
    versions = {"recjax": recjax.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    devices = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    return {
        "versions": versions,
        "devices": {**devices, "processes": jax.process_count()},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, path)
