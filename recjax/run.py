"""`recjax run`: every stage of a recipe, for every seed, then a bundle and a report.

    <workdir>/report.md, *.png, metrics.json     measured beside published and beside the baselines; means over seeds
    <workdir>/bundle/                            the best checkpoint of the first seed, ready to serve
    <workdir>/seed<k>/                           one run: checkpoints, metrics.jsonl, test/metrics.json, ...
    <workdir>/seed<k>/<stage>/                   the same where a recipe has several stages
    <workdir>/seed<k>/<stage>/artifacts/<kind>/  what the stage's header asks to infer

Stages run in order; a later one finds what the earlier ones left under the macro STAGES, the folder of its seed, which
is set for every stage that uses it. Stages whose role is "arm" or "main" are compared with each other. The bundle, the
head of the report and the tables beside the baselines are those of the main stage (`list.main_stage`).

A recipe that is a study (`configs/study/`) is handed to `recjax study`. Started again, a run goes on where it was.
Nothing here knows a model or a loss: it calls the other verbs.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recjax import cli, command
from recjax.account import account
from recjax.arms import MODEL, Arm, arms_table, compare_arms, groups
from recjax.core import mirror
from recjax.core.errors import INTERRUPTED, CheckpointError, ConfigError, UnservableError
from recjax.core.flags import Flags, find_file, parse_argv, recipe_files
from recjax.core.writer import CONFIG, MANIFEST, environment, read_metrics
from recjax.curves import curves_tables
from recjax.data.examples import Examples
from recjax.data.pipeline import Feed
from recjax.evaluate import evaluate_run, show
from recjax.export import export_run
from recjax.infer import infer_run
from recjax.launch import cluster
from recjax.list import Header, main_stage, read_header
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.report import Report, write_report
from recjax.result_files import METRICS, write_json
from recjax.results import Result
from recjax.seeds import mean_of_seeds
from recjax.serve.bundle import Bundle
from recjax.serve.features import pad, pad_times
from recjax.stages import check_stages, recipe_of_stage
from recjax.study.__main__ import main as study_main
from recjax.study.__main__ import study_file
from recjax.tables import differences_table, number, systems_table
from recjax.train import Outcome, train
from recjax.trained import Trained, load

_ROOT = Path("runs")
_SAMPLE_USERS = 20  # that the page of a server shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one seed, done."""

    recipe: Recipe
    seed: int
    name: str
    header: Header
    workdir: Path
    outcome: Outcome
    results: dict[str, Result]
    targets_seen: float | None = None

    @property
    def result(self) -> Result:
        """What was found for the first task."""
        return next(iter(self.results.values()))

    @property
    def targets(self) -> int:
        """How many places its training has read, filled or not."""
        return self.outcome.step * self.recipe.feed.batch_size * self.recipe.feed.row_length

    def row(self) -> dict[str, Any]:
        """What the report says of it."""
        values = self.result.systems[MODEL].values if self.results else {}
        return {
            "stage": self.name,
            "seed": self.seed,
            "steps": self.outcome.step,
            "best_step": self.outcome.best_step,
            f"valid_{self.recipe.best_metric()}": None if self.outcome.best is None else number(self.outcome.best),
            **{
                f"test_{name}": number(values[name])
                for name in ("recall@10", "ndcg@10", "auc", "weighted_auc", "grouped_auc", "log_loss", "nll")
                if name in values
            },
            **({} if self.targets_seen is None else {"targets_seen": f"{self.targets_seen:.1%}"}),
            **account(self.workdir, targets=self.targets),
            "training": f"{self.outcome.seconds / 60:.1f} min" if self.outcome.seconds >= 1 else "done before",
            **_adapters(self.workdir),
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
    """Run the stages in `files` for every seed; the report and the main stage of each seed.

    `flags` carries what is read after each stage's own file: further gin files and bindings. None when a stage was
    told to stop: started again, it goes on. What cannot be configured, or trained on these data, is refused before
    anything is trained.
    """
    stages: list[Stage] = []
    main_stage({file.stem: read_header(file) for file in files})
    check_stages(files, flags, workdir / f"seed{seeds[0]}", seeds[0], cache)
    for seed in seeds:
        for file in files:
            found = _stage(file, files, flags, workdir / f"seed{seed}", seed=seed, cache=cache, words=words)
            if found is None:
                return None
            stages.append(found)
    ranked = [stage for stage in stages if stage.results]
    if not ranked:
        raise ConfigError(
            "no stage ranks anything, so that there is nothing to report",
            where=f"{workdir}, where the stages and their artifacts are whole",
            mend="recjax train and recjax infer are the verbs for a stage on its own",
        )
    name = main_stage({stage.name: stage.header for stage in ranked})
    main = [stage for stage in stages if stage.name == name]
    metrics, *others = (
        mean_of_seeds([stage.results[task].metrics() for stage in main], [stage.seed for stage in main])
        for task in main[0].results
    )
    metrics["tasks"] = others
    metrics["arms"] = [compare_arms(group) for group in groups(_arms(stages)) if len(group) > 1]
    metrics["amounts"] = _amounts(ranked, main)
    facts = {"machine": environment()}
    if cluster.is_lead():
        write_json(workdir / METRICS, metrics)
        # A recipe makes its parts of what gin was told last, which were other stages and seeds.
        [file] = [file for file in files if file.stem == name]
        recipe, _ = recipe_of_stage(file, files, flags, workdir / f"seed{seeds[0]}", seeds[0])
        facts |= _export(load(recipe, main[0].workdir, cache=cache), workdir / "bundle")
    report = Report(
        name=main[0].recipe.name,
        command=shlex.join(words),
        metrics=metrics,
        header=dataclasses.asdict(main[0].header),
        facts=facts,
        curve=read_metrics(main[0].workdir / "metrics.jsonl"),
        stages=[stage.row() for stage in stages],
        curves=curves_tables(_records(stages)),
    )
    return write_report(workdir, report), main


def _amounts(stages: Sequence[Stage], main: Sequence[Stage]) -> list[dict[str, Any]]:
    """The stages that are the main one but for the length of their training (`trends.amounts_table`)."""
    first, wanted = main[0].seed, _but_for_length(main[0])
    alike = [s for s in stages if s.seed == first and s.header.compared and _but_for_length(s) == wanted]
    found = []
    for one in alike:
        same = [stage for stage in stages if stage.name == one.name]
        metrics = mean_of_seeds([stage.result.metrics() for stage in same], [stage.seed for stage in same])
        parts = {part: {MODEL: metrics[part][MODEL]} for part in ("rows", "intervals")}
        found.append({"stage": one.name, "tokens": one.targets, **parts})
    return sorted(found, key=lambda one: one["tokens"]) if len(found) > 1 else []


def _but_for_length(stage: Stage) -> list[str]:
    """What configured a stage, its seed and its number of steps left out."""
    lines = (stage.workdir / CONFIG).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(("TRAIN_STEPS = ", "SEED = "))]


def _adapters(workdir: Path) -> dict[str, str]:
    """How large the adapters of all domains together are beside the dense layers, where there are any."""
    counts = json.loads((workdir / MANIFEST).read_text(encoding="utf-8")).get("parameters", {})
    share = counts["adapters"] / counts["backbone"] if "adapters" in counts else 0
    return {"adapters": f"{share:.1%} of the backbone"} if share else {}


def _records(stages: Sequence[Stage]) -> dict[str, list[list[dict[str, float]]]]:
    """For each of several stages what its seeds logged."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    for stage in stages:
        found.setdefault(stage.name, []).append(read_metrics(stage.workdir / "metrics.jsonl"))
    return found if len(found) > 1 else {}


def _stage(
    file: Path,
    files: Sequence[Path],
    flags: Flags,
    folder: Path,
    *,
    seed: int,
    cache: Path | None,
    words: Sequence[str],
) -> Stage | None:
    """Train, infer and evaluate one stage in its place under `folder`; None when it was told to stop."""
    header = read_header(file)
    recipe, snapshot = recipe_of_stage(file, files, flags, folder, seed)
    place = folder / (file.stem if len(files) > 1 else "")
    outcome = train(recipe, place, snapshot=snapshot, cache=cache, words=words)
    if outcome.stopped == "signal":
        return None
    for kind in header.infer.replace(",", " ").split():
        if not (out := place / "artifacts" / kind).exists():
            infer_run(load(recipe, place, cache=cache), kind=kind, out=out)
    results = evaluate_run(recipe, place, cache=cache, settings=snapshot.config)
    return Stage(
        recipe=recipe,
        seed=seed,
        name=file.stem,
        header=header,
        workdir=place,
        outcome=outcome,
        results=results,
        targets_seen=_targets_seen(recipe, cache) if header.compared and isinstance(recipe.feed, Feed) else None,
    )


def _targets_seen(recipe: Recipe, cache: Path | None) -> float:
    """Share of the training targets of the first task that the recipe's steps reach at least once."""
    batches: Any = Assembly(recipe, ensure_prepared(recipe.mixture, cache)).batches()
    epochs = max(1, round(batches.epochs_of(recipe.train_steps, recipe.feed.batch_size)[0]))
    seen = batches.coverage([epochs])[0].total[0]
    batches.close()
    return seen


def _arms(stages: Sequence[Stage]) -> list[Arm]:
    """The arms of an experiment in order, each with all its seeds and once for every task it was evaluated on."""
    names = list(dict.fromkeys(stage.name for stage in stages if stage.header.compared))
    found = []
    for name in names:
        mine = [stage for stage in stages if stage.name == name]
        for task in mine[0].results:
            results = {stage.seed: stage.results[task] for stage in mine}
            header = mine[0].header
            found.append(Arm(name=name, title=header.title, results=results, against=header.against))
    return found


def _export(run: Trained, out: Path) -> dict[str, str]:
    """Write the bundle in place of an earlier one; a fact for the report when the model cannot have one."""
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        export_run(run, new, sample_users=_SAMPLE_USERS)
    except UnservableError as error:
        return {"bundle": f"none: {error.what}"}
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)
    return {}


def recommend_to_someone(bundle: Bundle, examples: Examples, user_index: int, k: int = 3) -> list[str]:
    """What the exported bundle answers a user of the test split, in words."""
    source = examples.source("test")
    example = next(e for e in map(source.__getitem__, range(len(source))) if int(e["user_index"]) == user_index)
    if examples.text_vocab is not None:
        query = examples.query_text(example["text"])
        who, encoded = f"For {query!r}:", bundle.encode_query(query)
    else:
        items = bundle.vocab.decode(example["items"])
        known = [at for at, item in enumerate(items) if item is not None]
        times = {}
        if bundle.times != "none":
            times = {"history_time": example["times"][known].tolist(), "time": int(example["label_time"])}
        who, encoded = "", bundle.encode([item for item in items if item is not None], **times)
    history = pad([encoded.history_ids], count=1, width=bundle.prompt_length)
    when = pad_times([encoded], bundle.times, count=1, width=bundle.prompt_length)
    seen = pad([encoded.seen_ids], count=1, width=max(len(encoded.seen_ids), 1))
    scores, rows = bundle.recommend(history, seen, *when)

    def word(row: int) -> str:
        return bundle.titles[row] or str(bundle.vocab.decode([row])[0])

    had = ", ".join(map(word, example["items"][-3:].tolist()))
    lines = [who or f"User {examples.user_ids()[user_index]}, who last had {had}:"]
    lines += [f"  {i + 1}. {word(int(rows[0, i]))} (score {scores[0, i]:.2f})" for i in range(k)]
    return lines


def main(argv: list[str]) -> int:
    """Run a recipe from data to report."""
    flags = parse_argv(argv)
    parser = cli.ArgumentParser("run")
    parser.epilog = "gin flags: --gin_file=FILE, --gin.NAME=VALUE, --gin_search_paths=DIR"
    parser.add_argument("recipe", nargs="?", default="", help="its name; a --gin_file beside it varies every stage")
    parser.add_argument("--workdir", type=Path, help="default: runs/<recipe>")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2; each is a run of its own (default 0)")
    parser.add_argument("--cache", type=Path, help="where prepared examples are kept (default: RECJAX_CACHE)")
    args = parser.parse_args(list(flags.rest))
    if not args.recipe and not flags.gin_files:
        raise ConfigError("which recipe?", expected="its name or --gin_file=FILE", mend="`recjax list` shows them")
    if args.recipe and study_file(args.recipe):
        if args.seeds != "0":
            raise ConfigError("a study has seeds of its own", where="--seeds", mend="--gin.grid.Study.seeds=(0,1,2)")
        return study_main(argv)
    seeds = args.seeds.split(",")
    if not all(seed.strip().isdecimal() for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ConfigError(f"cannot read --seeds {args.seeds}", expected="different whole numbers, such as 0,1,2")
    if any(binding.startswith("SEED=") for binding in flags.bindings):
        raise ConfigError("SEED is set by --seeds", mend="recjax run RECIPE --seeds 1")
    if args.recipe:
        files = recipe_files(args.recipe)
    else:
        files = [find_file(name, flags.search_paths) for name in flags.gin_files]
        flags = dataclasses.replace(flags, gin_files=())
    command.start_jax()
    workdir = args.workdir or _ROOT / (args.recipe or files[0].parent.name).replace("/", "-")
    told: dict[str, Any] = {"seeds": [int(seed) for seed in seeds], "cache": args.cache}
    with mirror.local(workdir, error=CheckpointError, cache=args.cache) as folder:
        found = run(files, flags, folder, words=["recjax", "run", *argv], **told)
        if found is None:
            return INTERRUPTED
        _show(*found, folder, args.cache)
    return 0


def _show(report: Path, main: Sequence[Stage], workdir: Path, cache: Path | None) -> None:
    """Print the tables of the report, and what the bundle recommends to a few users."""
    if cluster.is_lead():
        metrics = json.loads((workdir / METRICS).read_text(encoding="utf-8"))
        for part in (metrics, *metrics["tasks"]):
            show([systems_table(part), differences_table(part)])
        show([*map(arms_table, metrics["arms"])])
        [examples, *_] = ensure_prepared(main[0].recipe.mixture, cache)
        for sample in main[0].result.samples[: (workdir / "bundle").is_dir()]:
            print("\n".join(recommend_to_someone(Bundle(workdir / "bundle"), examples, sample["user_index"])))
        print(f"\n{report}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
