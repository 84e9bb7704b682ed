"""How fast a train step of SASRec and of HSTU is, beside plain PyTorch and RecBole, on the CPU of this machine.

    python benchmarks/train_step.py [--data DIR] [--models sasrec hstu] [--losses full sampled] [--rounds 5]

Every competitor runs in a process of its own and they take turns (A B A B), so that a busy machine slows all of them;
the figures to trust are the ratios. All train the same model (length 200, width 64, two heads, two blocks; SASRec with
feed-forward width 64; HSTU with biases by distance and by time, which is drawn; dropout 0.2 on embeddings, SASRec's
attention weights and what each block adds; Adam, float32) in batches of 128 rows, and are counted in real tokens:
positions that have a target. recjax packs several users into a row where they fit; the others pad. RecBole trains one
target per row (512 rows a batch), so its unit is targets per second; it wants an older numpy, so it may live in a
Python of its own (--recbole-python).

Without --data the log is simulated, with the number of users and items and about the history lengths of MovieLens-1M.
With it, DIR is a folder with interactions.parquet (user_id, item_id, position or timestamp). Results go to
benchmarks/results/train_step.{md,json}, those of one model alone to train_step_MODEL.{md,json}.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKERS = {"recjax": "step_recjax.py", "torch": "step_torch.py", "recbole": "step_recbole.py"}
NAMES = {"recjax": "recjax", "torch": "PyTorch (eager, padded)", "recbole": "RecBole"}


class Competitor:
    """A worker process that runs steps when told to."""

    def __init__(self, name: str, model: str, loss: str, args: argparse.Namespace) -> None:
        self.name = name
        python = args.recbole_python if name == "recbole" else sys.executable
        command = [python, str(HERE / WORKERS[name]), "--loss", loss, "--rows", str(args.rows)]
        if name != "recbole":
            command += ["--model", model]
        command += ["--length", str(args.length), "--threads", str(args.threads), "--data", args.data]
        if name == "recjax":
            command += ["--accumulate", str(args.accumulate)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()
        self.rates: list[float] = []

    def run(self, steps: int) -> None:
        """Take `steps` steps and note the rate."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.rates.append(answer["targets"] / answer["seconds"])
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
        raise SystemExit(f"{NAMES[self.name]} stopped with status {self.process.wait()}")


def compare(model: str, loss: str, args: argparse.Namespace) -> list[dict]:
    """One row per competitor for a model and a loss; the ratio is recjax to it, by rounds."""
    with_recbole = model == "sasrec" and loss == "full" and args.recbole_steps
    names = ["recjax", "torch"] + (["recbole"] if with_recbole else [])
    found = []
    for name in names:
        competitor = Competitor(name, model, loss, args)
        if missing := competitor.facts.get("missing"):
            print(f"{NAMES[name]}: not installed ({missing})")
            competitor.close()
            continue
        found.append(competitor)
    steps = {"recjax": args.steps, "torch": args.steps, "recbole": args.recbole_steps}
    for number in range(args.rounds):
        for competitor in found:
            competitor.run(steps[competitor.name])
        rates = ", ".join(f"{c.name} {c.rates[-1]:,.0f}/s" for c in found)
        print(f"{model}, {loss}, round {number + 1}: {rates}", flush=True)
    rows = []
    for competitor in found:
        competitor.close()
        ratios = [ours / theirs for ours, theirs in zip(found[0].rates, competitor.rates, strict=True)]
        row = {"model": model, "loss": loss, "who": competitor.name}
        row |= {"targets_per_second": statistics.median(competitor.rates)}
        row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)], **competitor.facts}
        rows.append(row)
    return rows


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """The results as markdown, with where and when they were measured."""
    lines = [
        "# Train step on CPU",
        "",
        f"{datetime.date.today()}, {_machine()}, {args.threads} threads; Python {platform.python_version()}.",
        f"Data: {'MovieLens-1M lengths, simulated' if not args.data else Path(args.data).name}. "
        f"Medians of {args.rounds} rounds in turn. Command: `python benchmarks/train_step.py{_options()}`.",
        "",
        "| model | loss | who | real tokens/s | recjax is faster by (range) | filled slots | compile s "
        "| step plans MiB | process peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["ratio_range"]
        ratio = "" if r["who"] == "recjax" else f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})"
        plan = f"{r['plan_mib']:.0f}" if "plan_mib" in r else ""
        compile_s = f"{r['compile_s']:.1f}" if "compile_s" in r else ""
        lines.append(
            f"| {r['model']} | {r['loss']} | {NAMES[r['who']]} {r['version']} | {r['targets_per_second']:,.0f} "
            f"| {ratio} | {r['fill']:.0%} | {compile_s} | {plan} | {r['peak_mib']:.0f} |"
        )
    return "\n".join([*lines, ""])


def _machine() -> str:
    try:
        model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")][0]
        return model.partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _options() -> str:
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return "".join(f" {w}" for w in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--models", nargs="+", default=["sasrec", "hstu"], choices=["sasrec", "hstu"])
    parser.add_argument("--losses", nargs="+", default=["full", "sampled"], choices=["full", "sampled"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps a round")
    parser.add_argument("--recbole-steps", type=int, default=1, help="steps a round for RecBole; 0 leaves it out")
    parser.add_argument("--recbole-python", default=sys.executable, help="the interpreter that has RecBole")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=8, help="micro-batches of recjax's step")
    args = parser.parse_args()
    rows = [row for m in args.models for loss in args.losses for row in compare(m, loss, args)]
    report = table(rows, args)
    print("\n" + report)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    name = f"train_step_{args.models[0]}" if len(args.models) == 1 else "train_step"
    (results / f"{name}.md").write_text(report)
    (results / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
