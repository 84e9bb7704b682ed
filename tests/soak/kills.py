"""Kill a training over and over, and compare what it ends with to the training that nobody touched.

    python tests/soak/kills.py --kills 100 --seed 0        (`make soak`)

Processes are ended by SIGKILL or SIGTERM at moments drawn from the seed: while it starts, between steps, while a
checkpoint is written or old ones are deleted, while examples are prepared, and one process of two. Every run that
comes to its end must have the bit-same weights, optimiser state, data position and metrics as the undisturbed one.
Children are forked from this process, which has imported everything and touched no device, so that a kill costs
seconds. Prints where the kills fell; the exit status is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).with_name("soak.gin")
PLACES = {"start": 2, "step": 4, "save": 4, "sealed": 2}  # where to aim, and how often
SAVES = 0.03  # seconds within which a save of this size is over
LIMIT = 300.0
TOLD = (143, -signal.SIGTERM)


class Child:
    """A forked process, the head of its group; `status` is negative for the signal that ended it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.status: int | None = None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """The exit status, if there is one."""
        if self.status is None:
            found, status = os.waitpid(self.number, options)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def wait(self) -> int:
        """The exit status, when there is one."""
        status = self.poll(0)
        assert status is not None
        return status

    def kill(self, number: int) -> None:
        """Send a signal to the whole group, to what is left of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.number, number)


class Soak:
    """One folder with a recipe, its undisturbed end, and a tally of where kills fell."""

    def __init__(self, folder: Path, *, seed: int, steps: int, cache: Path) -> None:
        self.folder, self.cache, self.steps = folder, cache, steps
        self.chance = random.Random(seed)
        self.fell: collections.Counter[str] = collections.Counter()
        self.startup = 0.0  # seconds to the first step
        folder.mkdir(parents=True, exist_ok=True)

    def words(self, workdir: Path) -> list[str]:
        """The arguments of `recjax train`."""
        return [
            f"--gin_file={RECIPE}", f"--workdir={workdir}", f"--cache={self.cache}", f"--gin.TRAIN_STEPS={self.steps}"
        ]  # fmt: skip

    def start(self, workdir: Path) -> Child:
        """Fork a child that trains, in a process group of its own."""
        child = os.fork()
        if child:
            return Child(child)
        status = 70
        try:
            os.setsid()
            with open(self.folder / "log.txt", "a") as log:
                os.dup2(log.fileno(), 2)
                os.dup2(log.fileno(), 1)
            from recjax import cli, train

            status = cli.run(train.main, self.words(workdir))
        finally:
            os._exit(status)

    def finish(self, workdir: Path) -> None:
        """Train to the end, undisturbed."""
        begun, child = time.monotonic(), self.start(workdir)
        while not self._lines(workdir) and child.poll() is None:
            time.sleep(0.01)
        self.startup = self.startup or time.monotonic() - begun
        if status := child.wait():
            raise SystemExit(f"the training ended with status {status}: see {self.folder / 'log.txt'}")

    def kill_once(self, workdir: Path, place: str) -> bool:
        """Start, and kill at a moment of that kind; False when it had come to its end before."""
        before, at_most = self._lines(workdir), LIMIT
        if place == "start":
            at_most = self.chance.random() * self.startup
        name = self.chance.choices(["SIGKILL", "SIGTERM", "both"], [6, 3, 1])[0]
        moment, late = self._moment(workdir, place, before)
        child, deadline = self.start(workdir), time.monotonic() + at_most
        while time.monotonic() < deadline and not moment():
            if child.status is not None or child.poll() is not None:
                break
            time.sleep(0.001)
        time.sleep(self.chance.random() * late)
        seen = self._where(workdir, before)
        for number in {"SIGKILL": [9], "SIGTERM": [15], "both": [15, 9]}[name]:
            child.kill(number)
            time.sleep(self.chance.random() * SAVES if name == "both" else 0)
        status = child.wait()
        if status == 0:
            return False
        if status not in (-signal.SIGKILL, *TOLD):
            raise SystemExit(f"after {name} the training ended with status {status}: see {self.folder / 'log.txt'}")
        self.fell[f"{name} {seen}"] += 1
        return True

    def _moment(self, workdir: Path, place: str, before: int) -> tuple[Callable[[], bool], float]:
        """When to kill, and up to how many seconds after that."""
        checkpoints = workdir / "checkpoints"
        least = before + self.chance.randrange(1, 4)

        def saving() -> bool:
            return self._lines(workdir) >= least and any(checkpoints.glob(".[sd]*-*"))

        def sealed() -> bool:
            return any(int(path.name) > before for path in checkpoints.glob("0*") if path.name.isdigit())

        if place == "start":
            return (lambda: False), 0.0
        moments = {"step": (lambda: self._lines(workdir) >= least), "save": saving, "sealed": sealed}
        return moments[place], SAVES

    def _lines(self, workdir: Path) -> int:
        file = workdir / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def _where(self, workdir: Path, before: int) -> str:
        """What is being done, by what lies there."""
        checkpoints = workdir / "checkpoints"
        if any(checkpoints.glob(".saving-*")):
            return "while saving"
        if any(checkpoints.glob(".deleting-*")):
            return "while deleting"
        return "between steps" if self._lines(workdir) > before else "while starting"

    def kill_while_preparing(self, workdir: Path) -> bool:
        """Forget the examples, and kill the group while another process makes them."""
        shutil.rmtree(self.cache, ignore_errors=True)
        child, deadline = self.start(workdir), time.monotonic() + LIMIT
        is_late = self.chance.random() < 0.7  # else at any time before the examples are being written
        wait = self.chance.uniform(1.0, 8.0)
        begun = time.monotonic()
        while time.monotonic() < deadline:
            if any(self.cache.glob(".*.tmp")) if is_late else time.monotonic() > begun + wait:
                break
            time.sleep(0.002)
        time.sleep(self.chance.random() * 0.3)
        done = any(path.is_dir() and not path.name.startswith(".") for path in self.cache.glob("*"))
        child.kill(signal.SIGKILL)
        child.wait()
        self.fell["SIGKILL while starting" if done else "SIGKILL while preparing"] += 1
        return True

    def end_of(self, workdir: Path) -> dict[str, Any]:
        """What a run has come to: a hash of all arrays of its last checkpoint, its data position, its metrics."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(writing, json.dumps(_end_of(workdir)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            text = pipe.read()
        Child(child).wait()
        return json.loads(text)


def _end_of(workdir: Path) -> dict[str, Any]:
    import jax
    import numpy as np

    from recjax.core import saved
    from recjax.core.writer import read_metrics

    folder = workdir / "checkpoints"
    path = folder / saved.name_of(saved.steps(folder)[-1])
    record = saved.check(path)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (dtype, shape) in record.signature.items()
    }
    found, digest = saved.load(path, saved.nested(target)), hashlib.sha256()
    for name, leaf in sorted(saved.by_path(found).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    lines = [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]
    return {"step": record.step, "arrays": digest.hexdigest(), "position": record.iterator, "metrics": lines}


def kill_pairs(soak: Soak, kills: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Runs of two processes, one of which is killed now and then; `recjax launch local` brings both back."""

    def launch(workdir: Path, *more: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "recjax", "launch", "local", "--verb=train", "--processes=2", *more]
        words += soak.words(workdir)
        with open(soak.folder / "log.txt", "a") as log:
            return subprocess.Popen(words, stderr=log, stdout=log)

    plain = launch(folder / "plain")
    if plain.wait():
        raise SystemExit(f"two processes ended with status {plain.returncode}: see {soak.folder / 'log.txt'}")
    yield soak.end_of(folder / "plain")
    done = rounds = 0
    while done < kills:
        workdir, rounds = folder / f"killed{rounds}", rounds + 1
        running = launch(workdir, "--restarts=1000")
        while running.poll() is None and done < kills:
            before, least = soak._lines(workdir), soak.chance.randrange(1, 5)
            while running.poll() is None and soak._lines(workdir) < before + least:
                time.sleep(0.002)
            found = children_of(running.pid)
            if running.poll() is None and len(found) == 2:
                seen = soak._where(workdir, before)
                os.kill(soak.chance.choice(found), soak.chance.choice([signal.SIGKILL, signal.SIGTERM]))
                soak.fell[f"one process of two {seen}"] += 1
                done += 1
                while set(found) & set(children_of(running.pid)) and running.poll() is None:
                    time.sleep(0.05)
        if running.wait():
            raise SystemExit(f"two processes ended with status {running.returncode}: see {soak.folder / 'log.txt'}")
        yield soak.end_of(workdir)


def children_of(process: int) -> list[int]:
    """The children of a process, by /proc."""
    found = Path(f"/proc/{process}/task/{process}/children")
    try:
        return sorted(int(number) for number in found.read_text().split())
    except OSError:
        return []


def main() -> int:
    """Kill so often, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="of one run (default 40)")
    parser.add_argument("--preparing", type=int, default=4, help="of the kills, so many while preparing (default 4)")
    parser.add_argument("--pairs", type=int, default=6, help="of the kills, so many of one process of two (default 6)")
    parser.add_argument("--cache", type=Path, help="prepared examples, of which no kill is to be while preparing")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fork.*")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="recjax-soak-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    import recjax.train  # noqa: F401 children are forked with it

    begun = time.monotonic()
    soak = Soak(folder, seed=args.seed, steps=args.steps, cache=args.cache or folder / "cache")
    if args.kills > 10:  # a first one compiles; the next says how long a start takes
        soak.finish(folder / "warm")
        soak.startup = 0.0
    soak.finish(folder / "plain")
    want, rounds = soak.end_of(folder / "plain"), 0
    preparing = 0 if args.cache else args.preparing
    single = args.kills - preparing - args.pairs
    plan = ["prepare"] * preparing + soak.chance.choices([*PLACES], [*PLACES.values()], k=max(single, 0))
    soak.chance.shuffle(plan)
    differ = []
    while plan:
        workdir, is_over = folder / f"killed{rounds}", False
        rounds += 1
        while plan and not is_over:
            place = plan[-1]
            killed = soak.kill_while_preparing(workdir) if place == "prepare" else soak.kill_once(workdir, place)
            if killed:
                plan.pop()
            is_over = not killed
        if not is_over:
            soak.finish(workdir)
        differ += [workdir.name] if soak.end_of(workdir) != want else []
    if args.pairs:
        ends = kill_pairs(soak, args.pairs, folder / "pairs")
        together = next(ends)
        differ += [f"pairs/killed{k}" for k, end in enumerate(ends) if end != together]
    told = ", ".join(f"{count} {where}" for where, count in sorted(soak.fell.items()))
    print(f"{soak.fell.total()} kills (seed {args.seed}) in {time.monotonic() - begun:.0f} s: {told}")
    print(f"{rounds} runs of {args.steps} steps: " + (f"DIFFERENT {differ}" if differ else "bit-same as undisturbed"))
    if not differ and args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
