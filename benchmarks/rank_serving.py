"""What one request to rank candidates takes: alone, and over HTTP on the same machine.

    python benchmarks/rank_serving.py [--recipes ctr unicorn] [--candidates 10 100 500] [--requests 500]
        [--clients 4] [--write]

Recipes' models with fresh weights (times do not depend on them) are exported from the simulated world and asked about
users and items of it, one request after the other. Columns of the table, in milliseconds:

    features      request columns to the fields of rows (`RankBundle.fields`)
    call          fields to logits (`RankBundle.logits`)
    shared        both where what the candidates have alike is made once (`RankBundle.answer`)
    ratio         of features and call together to that
    answer        bytes of a request to bytes of an answer, without HTTP, p50 and p99
    http          the same from a client over loopback with one connection kept open, p50 and p99
    processor     processor time of the server for a request over HTTP

Then `--clients` ask at the same time, each one request after the other: requests/s, and how many went together in a
call. `--write` puts everything into benchmarks/results/rank_serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from recjax import command
from recjax.core.flags import Flags, recipe_files
from recjax.data.examples import Examples
from recjax.data.requests_log import requests_of
from recjax.export_rank import export_ranker_run
from recjax.list import main_stage, read_header
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_desk import RankDesk
from recjax.serve.rank_request import parse_rank

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rank_serving.md"
WARM = 30
INSIDE = ("features", "call", "shared", "ratio", "answer p50", "answer p99")
HEADER = ("recipe", "candidates", *INSIDE, "http p50", "http p99", "processor")


def bundle_of(name: str, folder: Path) -> tuple[Path, list[dict[str, Any]], list[Any]]:
    """A bundle of the main stage of a recipe, contexts to ask with, and the ids of items."""
    stages = {path.stem: path for path in recipe_files(name)}
    main = stages[main_stage({stem: read_header(path) for stem, path in stages.items()})]
    recipe, _ = command.load(Flags(gin_files=(str(main),)))
    [examples] = ensure_prepared(recipe.mixture)
    assembly = Assembly(recipe, [examples])
    path = export_ranker_run(assembly, assembly.init_state().params, folder / name, name=name, recipe=name)
    return path, contexts_of(recipe.mixture.tasks[0], examples), list(examples.vocab.ids)


def contexts_of(task: Any, examples: Examples) -> list[dict[str, Any]]:
    """Of a log of requests what its rows say besides the item, of any other the users and columns of its rows."""
    rng, tables = np.random.default_rng(0), task.data.load()
    log = requests_of(tables) if hasattr(task, "kinds") else tables.interactions
    asked = {"user_id", "task", "query", "source_id", "device", "domain", "hour"} & set(log.columns)
    rows = log.select(sorted(asked)).sample(500, seed=0, with_replacement=True).to_dicts()
    rng.shuffle(rows)
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def bodies(
    contexts: Sequence[dict[str, Any]], items: Sequence[Any], candidates: int, count: int, columns: Sequence[str]
) -> list[bytes]:
    """Requests as clients send them."""
    rng = np.random.default_rng(candidates)
    known = set(columns)
    found = []
    for at in range(count):
        context = {name: value for name, value in contexts[at % len(contexts)].items() if name in known}
        chosen = [{"item_id": items[i]} for i in rng.integers(0, len(items), candidates)]
        found.append(json.dumps({"context": context, "candidates": chosen, "k": 10}).encode())
    return found


@contextlib.contextmanager
def served(path: Path) -> Iterator[tuple[str, int, int]]:
    """Host, port and process of a server over a bundle."""
    words = [sys.executable, "-m", "recjax.serve", "--bundle", str(path), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
            assert found is not None, "the server did not start"
            yield found[1], int(found[2]), process.pid
        finally:
            process.terminate()


def ask(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Seconds of one request."""
    start = time.perf_counter()
    connection.request("POST", "/v1/rank", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status == 200, text
    return time.perf_counter() - start


def processor(pid: int) -> float:
    """Seconds of processor time that a process has had; 0 where the system does not say."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")


def alone(bundle: RankBundle, requests: Sequence[bytes]) -> tuple[float, ...]:
    """Milliseconds: medians of features, call and what candidates share made once, the ratio of the first two to that,
    and p50 and p99 of an answer without HTTP."""
    desk, times = RankDesk(bundle), []
    for body in requests:
        start = time.perf_counter()
        asked = parse_rank(body)
        bundle.check(asked)
        json.dumps(desk.answers([asked])[0]).encode()
        times.append(time.perf_counter() - start)
    parts = []
    for body in requests[: len(requests) // 2]:
        asked = parse_rank(body)
        start = time.perf_counter()
        fields = bundle.fields([asked])
        between = time.perf_counter()
        bundle.logits(fields)
        end = time.perf_counter()
        bundle.answer([asked])
        parts.append((between - start, end - between, time.perf_counter() - end))
    features, call, shared = np.median(parts[WARM:], axis=0) * 1e3
    ratio = np.median([(a + b) / c for a, b, c in parts[WARM:]])
    return float(features), float(call), float(shared), float(ratio), *(np.percentile(times[WARM:], (50, 99)) * 1e3)


def together(host: str, port: int, requests: Sequence[bytes], clients: int) -> tuple[float, float]:
    """Requests a second of several clients at once, and how many requests went into a call on average."""

    def before() -> tuple[float, float]:
        connection = http.client.HTTPConnection(host, port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        found = [re.search(rf"recjax_batch_size_{name}{{[^}}]*}} ([\d.e+]+)", text) for name in ("sum", "count")]
        return tuple(float(f[1]) if f else 0.0 for f in found)  # type: ignore[return-value]

    def client(mine: Sequence[bytes]) -> None:
        connection = http.client.HTTPConnection(host, port)
        for body in mine:
            ask(connection, body)

    first = before()
    threads = [threading.Thread(target=client, args=(requests[at::clients],)) for at in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, last = time.perf_counter() - start, before()
    return len(requests) / seconds, (last[0] - first[0]) / max(last[1] - first[1], 1)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["ctr", "unicorn"])
    parser.add_argument("--candidates", nargs="+", type=int, default=[10, 100, 500])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    load, rows, notes = os.getloadavg(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.recipes:
            path, contexts, items = bundle_of(name, Path(folder))
            bundle = RankBundle(path)
            bundle.warm_up()
            columns = list(bundle.columns.kinds)
            with served(path) as (host, port, pid):
                for count in args.candidates:
                    requests = bodies(contexts, items, count, args.requests + WARM, columns)
                    inside = alone(bundle, requests)
                    connection = http.client.HTTPConnection(host, port)
                    for body in requests[:WARM]:
                        ask(connection, body)
                    spent = processor(pid)
                    times = [ask(connection, body) for body in requests[WARM:]]
                    spent = (processor(pid) - spent) / len(times) * 1e3
                    outside = np.percentile(times, (50, 99)) * 1e3
                    rows.append((name, count, *inside, *outside, spent))
                    print("\t".join(map(_shown, rows[-1])), flush=True)
                    if count == 100:
                        rate, size = together(host, port, requests, args.clients)
                        notes.append(f"{name}: {rate:,.0f} requests/s, {size:.1f} requests in a call")
    table = [f"| {' | '.join(HEADER)} |", "|---|" + "---:|" * (len(HEADER) - 1)]
    table += [f"| {' | '.join(map(_shown, row))} |" for row in rows]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = (
        f"{datetime.date.today()}, {_processor()}, {cores} of {os.cpu_count()} cores, load average before "
        f"{load[0]:.1f}, {load[1]:.1f}; Python {platform.python_version()}, jax {jax.__version__}."
    )
    said = " ".join(Path(word).name if at == 0 else word for at, word in enumerate(sys.argv))
    text = "\n".join(
        [
            "# Ranking over HTTP\n",
            about,
            f"Command: `python benchmarks/{said}`.\n",
            "Milliseconds; client and server share the cores.\n",
            *table,
            f"\n{args.clients} clients at a time, 100 candidates each:\n",
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
