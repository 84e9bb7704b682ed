"""How many users a second a full-catalogue evaluation ranks, beside plain PyTorch, on the CPU of this machine.

    python benchmarks/evaluation.py [--data DIR] [--lengths 200 50] [--rounds 5]

Each side runs in a process of its own and they take turns (A B A B), so that a busy machine slows both; the figures
to trust are the ratios. On a crowded machine the threads of PyTorch wait for each other; --threads 1 and the CPU
seconds of a round are fairer there. Both rank every user's last item among all items the user has not had, with the
same model (width 64, two heads, two blocks, feed-forward width 64, float32), and give the 50 best items; "rank only"
is PyTorch without those. recjax runs `recjax.evaluation.Evaluator`: everything it always does is counted (batches,
likelihood, coverage). Compilation is not: it is in the first round, which is shown apart.

Without --data the log is simulated, with the number of users and items and about the history lengths of MovieLens-1M.
With it, DIR is a folder with interactions.parquet. Results go to benchmarks/results/evaluation.{md,json}.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from train_step import _machine, _options

HERE = Path(__file__).resolve().parent
NAMES = {"recjax": "recjax", "torch": "PyTorch (eager, padded)", "torch_rank": "PyTorch (eager, padded), rank only"}


class Side:
    """A worker process that evaluates when told to."""

    def __init__(self, who: str, length: int, args: argparse.Namespace) -> None:
        self.who = who
        self.rates: list[float] = []
        self.cpu: list[float] = []
        command = [sys.executable, str(HERE / "evaluation_worker.py"), "--who", who, "--length", str(length)]
        command += ["--data", args.data, "--threads", str(args.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def run(self) -> None:
        """Evaluate once and note the rate."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.rates.append(self.facts["users"] / answer["seconds"])
        self.cpu.append(answer["cpu_s"])
        self.facts["peak_mib"] = answer["peak_mib"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{NAMES[self.who]} stopped with status {self.process.wait()}")


def compare(length: int, args: argparse.Namespace) -> list[dict]:
    """One row for each side; the ratio is recjax to it, by rounds."""
    sides = [Side(who, length, args) for who in NAMES]
    sides = [side for side in sides if "missing" not in side.facts]
    load = []
    for number in range(args.rounds):
        load.append(os.getloadavg()[0])
        for side in sides:
            side.run()
        shown = ", ".join(f"{s.who} {s.rates[-1]:,.0f}/s" for s in sides)
        print(f"length {length}, round {number + 1}: {shown}", flush=True)
    rows = []
    for side in sides:
        side.close()
        ratios = [ours / theirs for ours, theirs in zip(sides[0].rates, side.rates, strict=True)]
        row = {"length": length, "who": side.who, "users_per_second": statistics.median(side.rates)}
        row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)], "load": max(load)}
        row["cpu_s"] = statistics.median(side.cpu)
        row["cpu_ratio"] = row["cpu_s"] / statistics.median(sides[0].cpu)
        rows.append(row | side.facts)
    return rows


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """The results as markdown, with where and when they were measured."""
    load = max(row["load"] for row in rows)
    lines = [
        "# Full-catalogue evaluation on CPU",
        "",
        f"{datetime.date.today()}, {_machine()}, {args.threads} threads; load of the machine up to {load:.0f}.",
        f"Data: {'MovieLens-1M lengths, simulated' if not args.data else Path(args.data).name}, "
        f"{rows[0]['users']:,} users. Medians of {args.rounds} rounds in turn. "
        f"Command: `python benchmarks/evaluation.py{_options()}`.",
        "The ratio by CPU seconds is the one that a busy machine, and what each side makes of its cores, leaves alone.",
        "",
        "| length | who | users/s | recjax is faster by (range) | CPU s a round (ratio) | first round s "
        "| process peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["ratio_range"]
        ratio = "" if r["who"] == "recjax" else f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {r['length']} | {NAMES[r['who']]} {r['version']} | {r['users_per_second']:,.0f} | {ratio} "
            f"| {r['cpu_s']:.2f} ({r['cpu_ratio']:.2f}) | {r['first_s']:.1f} | {r['peak_mib']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 50])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = [row for length in args.lengths for row in compare(length, args)]
    report = table(rows, args)
    print("\n" + report)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "evaluation.md").write_text(report)
    (results / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
