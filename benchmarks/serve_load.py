"""A server under load on loopback: how fast, what it does with four times as much, and whether every answer is right.

    python benchmarks/serve_load.py --bundle runs/quickstart/bundle

starts `recjax serve` on a copy of the bundle and measures, all requests held against the same bundle in this process:

1. p50, p99 and requests a second for /v1/recommend and /v1/search, with 1, 8 and 32 requests at a time;
2. four times the rate of (1), for some seconds, with a short queue: what is answered, and how what is not;
3. requests made from its OpenAPI, right and wrong ones (10,000);
4. a newer version of the bundle put beside the old one, under load;
5. the end by SIGTERM, under load.

It writes a table to benchmarks/results/serve_load.md and ends with status 1 when an answer was wrong, or was neither
2xx nor 4xx nor 503.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from serve_client import LOST, Reply, Truth, drive, known_of, paths_of
from serve_fuzz import Asked, Fuzzer

from recjax.core.folder import write_manifest
from recjax.serve.bundle import Bundle
from recjax.serve.stored import WEIGHTS_FILE

RESULTS = Path(__file__).parent / "results" / "serve_load.md"
WRITTEN = ("files", "recjax_version", "created", "manifest_hash")
QUEUE = 64


def next_version(bundle: Path, to: Path) -> None:
    """A bundle that answers otherwise: the same with its vectors moved a little, one step later; appears whole."""
    beside = to.with_name(f".{to.name}.tmp")
    shutil.copytree(bundle, beside)
    weights = load_file(beside / WEIGHTS_FILE)
    rng = np.random.default_rng(0)
    moved = {
        name: array + (0.1 * array.std() * rng.normal(size=array.shape)).astype(array.dtype)
        if array.dtype.kind == "f" and array.ndim > 1
        else array
        for name, array in weights.items()
    }
    save_file({name: np.ascontiguousarray(array) for name, array in moved.items()}, beside / WEIGHTS_FILE)
    manifest = json.loads((beside / "manifest.json").read_text(encoding="utf-8"))
    manifest = {name: value for name, value in manifest.items() if name not in WRITTEN}
    write_manifest(beside, {**manifest, "step": manifest["step"] + 1})
    beside.rename(to)


def is_fine(status: int) -> bool:
    """Whether an answer is one that a server may give."""
    return 200 <= status < 300 or 400 <= status < 500 or status == 503


def counted(replies: Sequence[Reply]) -> str:
    """How often each status came, a lost connection by its name."""
    found = collections.Counter("lost" if reply.status == LOST else str(reply.status) for reply in replies)
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(found.items()))


def milliseconds(replies: Sequence[Reply], share: float) -> float:
    """That quantile of the time to answers that are answers."""
    times = [reply.seconds for reply in replies if reply.status == 200]
    return 1e3 * float(np.quantile(times, share)) if times else float("nan")


@dataclasses.dataclass
class Load:
    """The phases, against the server at `port`; `table` and `lines` are what is written down."""

    port: int
    fuzzer: Fuzzer
    truth: Truth
    bad: list[str] = dataclasses.field(default_factory=list)
    table: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)

    def pool(self, paths: Sequence[str], size: int) -> Callable[[], Asked]:
        """Right requests again and again, their answers known beforehand so that checking costs nothing."""
        asked = [self.fuzzer.right(path) for path, _ in zip(itertools.cycle(paths), range(size), strict=False)]
        for one in asked:
            for step in self.truth._bundles:
                self.truth._expected(step, one)
        each = itertools.cycle(asked)
        return lambda: next(each)

    async def ask(self, requests: Callable[[], Asked], *, fine: Callable[[int], bool] = is_fine, **how: float | int):
        """`drive`, every answer checked."""

        def check(asked: Asked, reply: Reply) -> None:
            self.truth.check(asked, reply)
            if not fine(reply.status):
                self.bad.append(f"{reply.status} for {asked.method} {asked.path} {asked.body[:100]!r}")

        return await drive("127.0.0.1", self.port, requests, check=check, **how)  # type: ignore[arg-type]

    async def speed(self, path: str, requests: Callable[[], Asked], seconds: float) -> float:
        """Phase 1 for one path; returns the most requests a second."""
        rates = []
        for at_once in (1, 8, 32):
            replies = await self.ask(requests, fine=lambda status: status == 200, connections=at_once, seconds=seconds)
            rates.append(len(replies) / seconds)
            p50, p99 = (milliseconds(replies, share) for share in (0.5, 0.99))
            self.table.append(f"| {path} | {at_once} | {rates[-1]:,.0f} | {p50:.1f} | {p99:.1f} |")
        return max(rates)

    async def overload(self, requests: Callable[[], Asked], capacity: float, seconds: float) -> list[Reply]:
        """Phase 2."""
        many = {"connections": 8 * QUEUE, "rate": 4 * capacity, "seconds": seconds}
        replies = await self.ask(requests, **many)
        answered, offered = sum(reply.status == 200 for reply in replies), len(replies) / seconds
        self.lines.append(
            f"Overload: {offered:,.0f} requests a second offered ({offered / capacity:.1f} times what it can do) over "
            f"{8 * QUEUE} connections, a queue of {QUEUE}: {counted(replies)}; "
            f"{answered / seconds:,.0f} a second answered, p50 {milliseconds(replies, 0.5):.0f} ms, "
            f"p99 {milliseconds(replies, 0.99):.0f} ms."
        )
        return replies

    async def fuzz(self, count: int) -> list[Reply]:
        """Phase 3."""
        before = self.truth.checked
        replies = await self.ask(self.fuzzer.any, connections=16, count=count)
        checked = self.truth.checked - before
        self.lines.append(f"Fuzzed: {len(replies):,} requests: {counted(replies)}; {checked:,} answers compared.")
        return replies

    async def reload(
        self,
        requests: Callable[[], Asked],
        rate: float,
        seconds: float,
        appear: Callable[[], None],
        connections: int = 16,
    ) -> list[Reply]:
        """Phase 4: after a third of the time `appear` puts the new version there, and two minutes is the end of it."""
        self.truth.by_step.clear()
        how: dict[str, Any] = {"fine": lambda status: status == 200, "connections": connections, "rate": rate}
        replies = await self.ask(requests, **how, seconds=seconds / 3)
        await asyncio.to_thread(appear)
        for _ in range(120):
            if len(self.truth.by_step) == 2:
                break
            replies += await self.ask(requests, **how, seconds=1.0)
        replies += await self.ask(requests, **how, seconds=seconds / 3)
        steps = ", ".join(f"{count:,} by step {step}" for step, count in sorted(self.truth.by_step.items()))
        self.lines.append(f"A newer bundle under {rate:,.0f} requests a second: {counted(replies)}; answered {steps}.")
        if len(self.truth.by_step) != 2:
            self.bad.append("the newer bundle was not served in time")
        return replies


@contextlib.contextmanager
def server(root: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`recjax serve` as a process, and its port."""
    command = [sys.executable, "-m", "recjax.serve", "--bundle", str(root), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "serving" not in line:
                raise SystemExit(f"the server did not start: {line}")
            yield process, int(line.split(":")[-1])
        finally:
            process.kill()


async def measure(load: Load, process: subprocess.Popen[str], root: Path, bundle: Bundle, options) -> None:
    """All phases but the end."""
    rates = {}
    for path in paths_of(bundle):
        rates[path] = await load.speed(path, load.pool([path], 300), options.seconds)
    capacity = min(rates.values())
    both = load.pool(paths_of(bundle), 600)
    await load.overload(both, capacity, 2 * options.seconds)
    await load.fuzz(options.fuzzed)

    def appear() -> None:
        (root / ".2.ready").rename(root / "2")
        process.send_signal(signal.SIGHUP)

    await load.reload(both, capacity / 3, max(20.0, 2 * options.seconds), appear)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--bundle", required=True, help="of a model that recommends, searches, or both")
    flags.add_argument("--seconds", type=float, default=10.0, help="for each measurement (default 10)")
    flags.add_argument("--fuzzed", type=int, default=10_000, help="requests made from the OpenAPI (default 10,000)")
    flags.add_argument("--out", type=Path, default=RESULTS)
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(options.bundle, root / "1")
        next_version(root / "1", root / ".2.ready")
        bundles = [Bundle(root / "1"), Bundle(root / ".2.ready")]
        flags_of_server = ("--max_queue", str(QUEUE), "--timeout_ms", "5000")
        with server(root, *flags_of_server) as (process, port):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as found:
                openapi = json.load(found)
            paths, truth = paths_of(bundles[0]), Truth(bundles)
            load = Load(port, Fuzzer(openapi, known_of(bundles[0]), paths), truth)
            asyncio.run(measure(load, process, root, bundles[0], options))
            process.send_signal(signal.SIGTERM)
            load.lines.append(f"Told to stop, it ended with status {process.wait(60)}.")
    ok = not truth.wrong and not load.bad
    load.lines.append(f"{truth.checked:,} answers compared, {len(truth.wrong)} wrong; {len(load.bad)} other failures.")
    told = bundles[0].manifest
    about = f"{told['recipe'] or told['name']}: {told['num_items']:,} items, history of {told['history_length']}"
    now = datetime.datetime.now(datetime.UTC).date()
    machine = f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, client beside the server"
    command = f"`python benchmarks/serve_load.py --bundle {Path(options.bundle).name} --seconds {options.seconds:g}`"
    head = [f"# Serving under load: {about}", f"{command}, {now}, {machine}."]
    table = ["| path | at a time | requests/s | p50 ms | p99 ms |", "|---|---|---|---|---|", *load.table]
    text = "\n\n".join([*head, "\n".join(table), *load.lines]) + "\n"
    options.out.write_text(text, encoding="utf-8")
    print(text)
    for line in [*truth.wrong[:5], *load.bad[:5]]:
        print(line, file=sys.stderr)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
