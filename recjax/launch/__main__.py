"""`recjax launch`: a recipe on several processes or machines.

    recjax launch local sasrec --processes=2 --devices=4 --gin.MESH=data=8
    recjax launch gke sasrec --image=IMAGE --tpu=v6e:4x4 --gin.TRAIN_STEPS=100000

What is no flag of the launcher belongs to the run. `local` runs at once; the others show what they would do, which is
all that `--dry-run` does for any of them, and do it with `--go`. jax is not needed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recjax import cli
from recjax.core.errors import ConfigError
from recjax.core.flags import did_you_mean, parse_argv, recipe_files
from recjax.launch.plan import RESTARTS, job_of

_FOLDER = Path("runs") / "launch"
KINDS = {
    "local": "processes on this machine, with simulated devices if wanted",
    "tpu_vm": "TPU VMs: queued resources, or a managed instance group",
    "gke": "a JobSet on GKE, or xpk",
    "slurm": "a batch script for SLURM",
    "ray": "a script for Ray Train",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The verb; returns the exit status, of `local` that of the run."""
    kind, *rest = list(argv or ()) or ["--help"]
    if kind in ("--help", "-h"):
        lines = "\n".join(f"  {name:<8}{text}" for name, text in KINDS.items())
        print(f"usage: recjax launch KIND RECIPE [--dry-run] [options]\n\n{lines}\n\nrecjax launch KIND --help")
        return 0
    if kind not in KINDS:
        raise ConfigError(f"no launcher {kind}", expected=", ".join(KINDS), mend=did_you_mean(kind, KINDS))
    launcher: Any = importlib.import_module(f"recjax.launch.{kind}")
    args, words = _parser(kind, launcher).parse_known_args(rest)
    if args.recipe:
        recipe_files(args.recipe)
    parse_argv(words)  # what is wrong with gin flags is said now
    job = job_of(args.recipe, args.verb, words, name=args.name, restarts=args.restarts)
    if kind == "local" and not args.dry_run:
        return launcher.run(job, args)
    plan = launcher.plan(job, args)
    if args.dry_run or not args.go:
        print(plan.shown(args.folder), end="")
        return 0
    plan.carry_out(args.folder)
    return 0


def _parser(kind: str, launcher: Any) -> argparse.ArgumentParser:
    out = cli.ArgumentParser(f"launch {kind}", description=KINDS[kind])
    out.add_argument("recipe", nargs="?", default="", help="its name; a --gin_file beside it varies every stage")
    out.add_argument("--verb", default="run", help="run (default), train or evaluate")
    out.add_argument("--name", default="", help="of the job (default: that of the recipe)")
    out.add_argument("--restarts", type=int, default=RESTARTS, help=f"at most so many (default {RESTARTS})")
    out.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    if kind != "local":
        out.add_argument("--go", action="store_true", help="write the files and run the commands")
    out.add_argument("--folder", type=Path, default=_FOLDER, help=f"for the files (default: {_FOLDER})")
    launcher.add_flags(out)
    return out


if __name__ == "__main__":
    sys.exit(cli.run(main))
