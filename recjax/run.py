"""`recjax run`: every stage of a recipe, for every seed, then a bundle and a report.

    <workdir>/report.md, *.png, metrics.json     measured beside published and beside the baselines; means over seeds
    <workdir>/bundle/                            the best checkpoint of the first seed, ready to serve
    <workdir>/seed<k>/                           one run: checkpoints, metrics.jsonl, test/metrics.json, ...
    <workdir>/seed<k>/<stage>/                   the same where a recipe has several stages

Started again, it goes on where it was. Nothing here knows a model or a loss: it calls the other verbs.
"""

from __future__ import annotations

import copy
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recjax import cli, command
from recjax.core import distributed
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, find_file, parse_argv, recipe_files
from recjax.core.writer import environment, read_metrics
from recjax.data.examples import Examples
from recjax.evaluate import evaluate_run, show
from recjax.export import export_bundle
from recjax.list import read_header
from recjax.prepare import ensure_prepared
from recjax.recipe import Recipe
from recjax.report import Report, write_report
from recjax.results import METRICS, Result, write_json
from recjax.serve.bundle import Bundle
from recjax.serve.features import pad
from recjax.tables import differences_table, number, systems_table
from recjax.train import INTERRUPTED, Outcome, train
from recjax.trained import Trained, load

_ROOT = Path("runs")
_MODEL = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one seed, done."""

    recipe: Recipe
    seed: int
    name: str
    workdir: Path
    outcome: Outcome
    result: Result

    def row(self) -> dict[str, Any]:
        """What the report says of it."""
        values = self.result.systems[_MODEL].values
        return {
            "stage": self.name,
            "seed": self.seed,
            "steps": self.outcome.step,
            "best_step": self.outcome.best_step,
            f"valid_{self.recipe.checkpoints.metric}": None if self.outcome.best is None else number(self.outcome.best),
            **{f"test_{name}": number(values[name]) for name in ("recall@10", "ndcg@10") if name in values},
            "training": f"{self.outcome.seconds / 60:.1f} min" if self.outcome.seconds >= 1 else "done before",
        }


def run(
    files: Sequence[Path],
    flags: Flags,
    workdir: Path,
    *,
    seeds: Sequence[int],
    cache: Path | None,
    words: Sequence[str],
) -> tuple[Path, list[Stage]] | None:
    """Run the stages in `files` for every seed; the report and the last stage of each seed.

    `flags` carries the bindings for all stages. None when a stage was told to stop: started again, it goes on.
    """
    stages: list[Stage] = []
    for seed in seeds:
        for file in files:
            bindings = (*flags.bindings, f"SEED={seed}")
            recipe, snapshot = command.load(dataclasses.replace(flags, gin_files=(str(file),), bindings=bindings))
            place = workdir / f"seed{seed}" / (file.stem if len(files) > 1 else "")
            outcome = train(recipe, place, snapshot=snapshot, cache=cache, words=words)
            if outcome.stopped == "signal":
                return None
            result = evaluate_run(recipe, place, cache=cache)
            stages.append(
                Stage(recipe=recipe, seed=seed, name=file.stem, workdir=place, outcome=outcome, result=result)
            )
    last = [stage for stage in stages if stage.name == files[-1].stem]
    metrics = mean_of_seeds([stage.result.metrics() for stage in last], [stage.seed for stage in last])
    if distributed.is_lead():
        write_json(workdir / METRICS, metrics)
        _export(load(last[0].recipe, last[0].workdir, cache=cache), workdir / "bundle")
    report = Report(
        name=last[0].recipe.name,
        command=shlex.join(words),
        metrics=metrics,
        header=dataclasses.asdict(read_header(files[-1])),
        facts={"machine": environment()},
        curve=read_metrics(last[0].workdir / "metrics.jsonl"),
        stages=[stage.row() for stage in stages],
    )
    return write_report(workdir, report), last


def mean_of_seeds(metrics: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """metrics.json of the first seed with the model's values, and the bounds of their intervals, averaged over seeds.

    Baselines have no seed. Buckets, samples and the differences to the baselines stay those of the first seed; the
    protocol says so, and `per_seed` keeps every seed's values.
    """
    out: dict[str, Any] = copy.deepcopy(dict(metrics[0]))
    out["per_seed"] = {str(seed): m["rows"][_MODEL] for seed, m in zip(seeds, metrics, strict=True)}
    out["protocol"]["seeds"] = {**out["protocol"]["seeds"], "recipe": list(seeds)}
    if len(metrics) > 1:
        for name in out["rows"][_MODEL]:
            out["rows"][_MODEL][name] = float(np.mean([m["rows"][_MODEL][name] for m in metrics]))
        for name in out["intervals"][_MODEL]:
            out["intervals"][_MODEL][name] = np.mean([m["intervals"][_MODEL][name] for m in metrics], axis=0).tolist()
        out["protocol"]["several_seeds"] = (
            f"values of the model and bounds of their intervals are means over the seeds; buckets, samples and "
            f"differences are of seed {seeds[0]}"
        )
    return out


def _export(run: Trained, out: Path) -> None:
    """Write the bundle in place of an earlier one."""
    new, examples = out.with_name(f".{out.name}.new"), run.assembly.examples[0]
    shutil.rmtree(new, ignore_errors=True)
    export_bundle(
        run.assembly.model,
        run.params,
        vocab=run.assembly.vocab,
        titles=examples.titles(),
        out=new,
        history_length=run.assembly.recipe.feed.history_length,
        name=run.assembly.recipe.name,
        recipe=run.assembly.recipe.name,
        step=run.step,
        checkpoint=str(run.checkpoint),
    )
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)


def recommend_to_someone(bundle: Bundle, examples: Examples, user_index: int, k: int = 3) -> list[str]:
    """What the exported bundle answers a user of the test split, in words."""
    source = examples.source("test")
    example = next(e for e in map(source.__getitem__, range(len(source))) if int(e["user_index"]) == user_index)
    encoded = bundle.encode([item for item in bundle.vocab.decode(example["items"]) if item is not None])
    history = pad([encoded.history_ids], count=1, width=bundle.history_length)
    scores, rows = bundle.recommend(history, encoded.seen_ids[None, :])

    def word(row: int) -> str:
        return bundle.titles[row] or str(bundle.vocab.decode([row])[0])

    had = ", ".join(map(word, example["items"][-3:].tolist()))
    lines = [f"User {examples.user_ids()[user_index]}, who last had {had}:"]
    lines += [f"  {i + 1}. {word(int(rows[0, i]))} (score {scores[0, i]:.2f})" for i in range(k)]
    return lines


def main(argv: list[str]) -> int:
    """Run a recipe from data to report."""
    flags = parse_argv(argv)
    parser = cli.ArgumentParser("run")
    parser.epilog = "gin flags: --gin_file=FILE, --gin.NAME=VALUE, --gin_search_paths=DIR"
    parser.add_argument("recipe", nargs="?", default="", help="name of a recipe, instead of --gin_file")
    parser.add_argument("--workdir", type=Path, help="default: runs/<recipe>")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2; each is a run of its own (default 0)")
    parser.add_argument("--cache", type=Path, help="where prepared examples are kept (default: RECJAX_CACHE)")
    args = parser.parse_args(list(flags.rest))
    if bool(args.recipe) == bool(flags.gin_files):
        raise ConfigError("which recipe?", expected="its name or --gin_file=FILE", mend="`recjax list` shows them")
    seeds = args.seeds.split(",")
    if not all(seed.strip().isdecimal() for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ConfigError(f"cannot read --seeds {args.seeds}", expected="different whole numbers, such as 0,1,2")
    if any(binding.startswith("SEED=") for binding in flags.bindings):
        raise ConfigError("SEED is set by --seeds", mend="recjax run RECIPE --seeds 1")
    named = [find_file(name, flags.search_paths) for name in flags.gin_files]
    files = recipe_files(args.recipe) if args.recipe else named
    command.start_jax()
    workdir = args.workdir or _ROOT / (args.recipe or files[0].parent.name).replace("/", "-")
    found = run(
        files, flags, workdir, seeds=[int(seed) for seed in seeds], cache=args.cache, words=["recjax", "run", *argv]
    )
    if found is None:
        return INTERRUPTED
    report, last = found
    if distributed.is_lead():
        metrics = mean_of_seeds([stage.result.metrics() for stage in last], [stage.seed for stage in last])
        show([systems_table(metrics), differences_table(metrics)])
        [examples, *_] = ensure_prepared(last[0].recipe.mixture, args.cache)
        for sample in last[0].result.samples[:1]:
            print("\n".join(recommend_to_someone(Bundle(workdir / "bundle"), examples, sample["user_index"])))
        print(f"\n{report}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
