"""How good a model is after how many minutes: the recipe `sasrec`, trained to its end for several lengths of run.

    python benchmarks/time_to_quality.py --data DIR [--steps 1000 2500 6000] [--seed 0]

Each length is a run of its own, whose learning rate falls to the end, as a user with that much time would train.
The time is that of the whole command but for preparing the examples: start, compilation with an empty cache,
training, evaluating every user of the test split over the whole catalogue. The item graph, which needs no training,
stands beside. Results go to benchmarks/results/time_to_quality.md.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data directory, such as MovieLens-1M")
    parser.add_argument("--recipe", default="sasrec")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 2500, 6000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = [
        f"# Time to quality: `{args.recipe}` on {Path(args.data).name}, test split",
        "",
        f"`python benchmarks/time_to_quality.py --data DIR --steps {' '.join(map(str, args.steps))}`, "
        f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start, {datetime.date.today()}.",
        "",
        "| steps | minutes | recall@10 | NDCG@10 | NDCG@10 of the item graph |",
        "|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for steps in args.steps:
        minutes, rows = run(args, steps)
        model, graph = rows["model"], rows["item_graph"]
        values = [model["recall@10"], model["ndcg@10"], graph["ndcg@10"]]
        lines.append(f"| {steps:,} | {minutes:.1f} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
        print(lines[-1], flush=True)
    out = HERE / "results" / "time_to_quality.md"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{out}")


def run(args: argparse.Namespace, steps: int) -> tuple[float, dict[str, dict[str, float]]]:
    """Minutes from the command to the test metrics, and those."""
    common = [f"--gin.DATA_DIR={args.data!r}", f"--gin.SEED={args.seed}", f"--gin.TRAIN_STEPS={steps}"]
    common += ["--gin.recipe.Recipe.eval_every=0", "--gin.evaluation.Evaluation.baselines=('item_graph',)"]
    recjax = [sys.executable, "-m"]
    subprocess.run([*recjax, "recjax.prepare", args.recipe, *common[:1]], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        where = [f"--workdir={folder}/run"]
        # Compiled programs of earlier runs are not to be found, prepared examples are.
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        started = time.perf_counter()
        for verb in ("train", "evaluate"):
            command = [*recjax, f"recjax.{verb}", *([args.recipe, *common] if verb == "train" else []), *where]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        minutes = (time.perf_counter() - started) / 60
        metrics = json.loads((Path(folder) / "run" / "test" / "metrics.json").read_text(encoding="utf-8"))
    return minutes, metrics["rows"]


if __name__ == "__main__":
    main()
