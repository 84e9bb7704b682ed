"""From a log to examples: `recjax prepare` beside a plain pandas script, and by Apache Beam.

    python benchmarks/prepare.py [--events 1000000 10000000] [--beam] [--write]

A log of simulated events (users and items by power laws, in order of time, 50 events a user) is written as Parquet.
Each way of preparing it is a process of its own, one thread, that makes the same: an item vocabulary by popularity in
training, and each user's history and target of train, valid and test, leave one out, on disk. That both made the same
is checked, example by example. recjax also hashes what it reads and writes, checks the log for mistakes, and counts.

Prints markdown: seconds of processor time and of the clock without imports, how many times as fast as pandas by
processor time, and the largest memory of the process. `--write` writes it to benchmarks/results/prepare.md as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SPLITS = ("train", "valid", "test")
RESULT = Path(__file__).parent / "results" / "prepare.md"


def write_log(events: int, folder: Path) -> None:
    """A log of so many events in order of time, its ids in no order."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    users, items = max(events // 50, 10), max(events // 100, 10)
    user = rng.permutation(users * 20)[:users][(rng.random(events) ** 1.5 * users).astype(np.int64)]
    item = rng.permutation(items * 4)[:items][(rng.random(events) ** 3 * items).astype(np.int64)]
    when = np.sort(rng.integers(1_600_000_000, 1_700_000_000, events))
    pl.DataFrame({"user_id": user, "item_id": item, "timestamp": when}).write_parquet(folder / "interactions.parquet")


def plain_pandas(folder: Path, out: Path) -> None:
    """The script that one writes without a library for it."""
    log: Any = pd.read_parquet(folder / "interactions.parquet")
    log = log.sort_values(["user_id", "timestamp"], kind="stable")
    size = log.groupby("user_id")["item_id"].transform("size")
    left = log.groupby("user_id").cumcount(ascending=False)
    counts = log[(left >= 2) | (size < 3)]["item_id"].value_counts().reindex(log["item_id"].unique(), fill_value=0)
    items = counts.rename("train_count").rename_axis("item_id").reset_index()
    items = items.sort_values(["train_count", "item_id"], ascending=[False, True], ignore_index=True)
    items["row"] = items.index + 2
    log["row"] = log["item_id"].map(items.set_index("item_id")["row"])
    histories = log.groupby("user_id").agg(items=("row", list), times=("timestamp", list))
    found: dict[str, list[tuple]] = {split: [] for split in SPLITS}
    for user, (rows, times) in enumerate(zip(histories["items"], histories["times"], strict=True)):
        trained = len(rows) - 2 if len(rows) >= 3 else len(rows)
        if trained >= 2:
            found["train"].append((user, rows[:trained], times[:trained], None))
        if len(rows) >= 3:
            found["valid"].append((user, rows[:-2], times[:-2], rows[-2]))
            found["test"].append((user, rows[:-1], times[:-1], rows[-1]))
    for split, examples in found.items():
        columns = ["user_index", "items", "times", "label"]
        pd.DataFrame(examples, columns=columns).to_parquet(out / f"{split}.parquet")
    items.to_parquet(out / "items.parquet")


def recjax(folder: Path, out: Path, runner: Any = None) -> None:
    """The same by `recjax prepare`."""
    prepare(Mixture(tasks=(NextItem(data=DataDir(path=str(folder))),)), out, runner=runner)


def measure(way: str, folder: Path, out: Path) -> dict[str, Any]:
    """One way in a process of its own: seconds by processor and clock, and MB."""
    command = [sys.executable, __file__, "--worker", way, str(folder), str(out)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True)
    return {"way": way, **json.loads(done.stdout.splitlines()[-1])}


def work(way: str, folder: Path, out: Path) -> None:
    """The other end of `measure`."""
    out.mkdir()
    do: Any = plain_pandas if way == "pandas" else recjax
    more = {"runner": Runner()} if way == "beam" else {}
    clock, processor = time.perf_counter(), time.process_time()
    do(folder, out, **more)
    told = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
    print(json.dumps({**told, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def check(ours: Path, theirs: Path) -> None:
    """Compare every example, and the vocabulary."""
    import numpy as np
    import polars as pl

    from recjax.data.examples import Examples

    (folder,) = (path for path in ours.iterdir() if path.is_dir() and not path.name.startswith("."))
    examples = Examples.open(folder, verify=True)
    assert pl.read_parquet(folder / "items.parquet")["item_id"].equals(
        pl.read_parquet(theirs / "items.parquet")["item_id"]
    )
    for split in SPLITS:
        names = [
            field.name for field in examples.schema(split) if field.name in ("user_index", "items", "times", "label")
        ]
        source, frame = examples.source(split, memory_bytes=2**40), pl.read_parquet(theirs / f"{split}.parquet")
        for name in names:
            column, want = source.columns[name], frame[name]
            if column.offsets is not None:
                assert np.array_equal(np.diff(column.offsets), want.list.len().to_numpy())
                want = want.explode()
            assert np.array_equal(column.values, want.to_numpy()), (split, name)


def table(found: list[dict[str, Any]], events: list[int], command: str) -> str:
    """The result as markdown."""
    chip = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    lines = [
        "# From a log to examples",
        "",
        f"{datetime.date.today()}, {chip or platform.machine()}, one thread each, seconds without imports; Python "
        f"{platform.python_version()}. Command: `{command}`.",
        "",
        "| events | way | processor s | clock s | times pandas | peak MB |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for size in events:
        rows = [row for row in found if row["events"] == size]
        base = next(row["processor"] for row in rows if row["way"] == "pandas")
        lines += [
            f"| {size:,} | {row['way']} | {row['processor']:.2f} | {row['seconds']:.1f} "
            f"| {base / row['processor']:.1f} | {row['mb']:,.0f} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--beam", action="store_true", help="by Beam's direct runner as well")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = []
    for events in args.events:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_log(events, folder)
            for way in ("pandas", "recjax", *(["beam"] if args.beam else [])):
                found.append({"events": events, **measure(way, folder, folder / way)})
                print(found[-1], file=sys.stderr, flush=True)
                if way != "pandas":
                    check(folder / way, folder / "pandas")
    command = "python " + " ".join(["benchmarks/prepare.py", *sys.argv[1:]])
    text = table(found, args.events, command)
    print(text)
    if args.write:
        RESULT.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        if sys.argv[2] == "pandas":
            import pandas as pd
        else:
            from recjax.data.beam_runner import Runner
            from recjax.data.sources import DataDir
            from recjax.prepare import prepare
            from recjax.tasks.mixtures import Mixture
            from recjax.tasks.next_item import NextItem
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
