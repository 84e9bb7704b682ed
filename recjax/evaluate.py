"""`recjax evaluate`: a checkpoint beside the baselines on every user of a split.

Writes `<workdir>/<split>/metrics.json` and `per_user.npz` and prints the tables; a mixture of several tasks has them
in `<workdir>/<split>/<task>/`. With `--compare A B` it computes
no ranks: it takes two folders that were evaluated before and says whether A is better than B.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import recjax
from recjax import cli, command, result_files
from recjax.codes_evaluation import CodesEvaluation, CodesEvaluator
from recjax.core import mirror
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.saved import FILES
from recjax.evaluation import assess
from recjax.label_evaluation import LabelEvaluator
from recjax.launch import cluster
from recjax.ranker_evaluation import RankerEvaluator
from recjax.recipe import Recipe
from recjax.result_files import METRICS, PER_USER, Comparison, compare
from recjax.results import Result
from recjax.tables import Table, buckets_table, differences_table, hard_tables, number, signed, systems_table
from recjax.trained import Trained, load

SPLITS = ("test", "valid")


def evaluate_run(
    recipe: Recipe,
    workdir: Path,
    *,
    split: str = "test",
    checkpoint: str = "",
    cache: Path | None = None,
    settings: str = "",
) -> dict[str, Result]:
    """Evaluate a checkpoint of `workdir` on every task of the mixture, unseen ones too; saves task -> result.

    `workdir` is a folder or a URL, and `checkpoint` chooses as in `trained.load`. With `settings`, the recipe as text,
    a result saved before for the same settings, examples and checkpoint by this version of recjax is read and not
    taken again. Raises `CheckpointError` when there is none that fits. Nothing is found for a model that ranks nobody:
    what there is to say of its codes stands in their artifact.
    """
    if isinstance(recipe.evaluation, CodesEvaluation):
        return {}
    with mirror.local(workdir, error=CheckpointError, cache=cache) as place:
        run = load(recipe, place, checkpoint=checkpoint, cache=cache)
        of = _identity(run, settings)
        stated = {
            "history_length": recipe.feed.history_length,
            "recipe": recipe.name,
            "checkpoint_step": run.step,
            "seeds": {"recipe": recipe.seed},
        }
        found = {}
        for at, task in enumerate(recipe.mixture.evaluated):
            folder = folder_of(recipe, place, split, task.name)
            # processes of one run that do not share a disk could disagree about what stands on it
            if settings and jax.process_count() == 1 and (standing := result_files.load(folder, of=of)):
                print(f"{folder / METRICS} stands: the same checkpoint, examples and settings", flush=True)
                found[task.name] = standing
                continue
            evaluator = run.assembly.evaluator(split, at)
            assert not isinstance(evaluator, CodesEvaluator)
            if isinstance(evaluator, LabelEvaluator | RankerEvaluator):
                found[task.name] = evaluator.assess(run.params, stated)
            else:
                found[task.name] = assess(evaluator, run.params, stated)
            if cluster.is_lead():
                result_files.save(found[task.name], folder, of=of)
                where = f"{split}, {task.name}" if len(recipe.mixture.evaluated) > 1 else split
                print(_line(recipe, found[task.name], where), flush=True)
        return found


def _line(recipe: Recipe, result: Result, where: str) -> str:
    """What the first system came to, in short."""
    system = next(iter(result.systems.values()))
    shown = ", ".join(f"{m} {system.values[m]:.4f}" for m in recipe.evaluation.shown() if m in system.values)
    return f"{where}: {shown} ({system.seconds:.1f} s)"


def _identity(run: Trained, settings: str) -> str:
    """A hash of all that a result follows from."""
    files = (run.checkpoint / FILES).read_bytes()
    prepared = [examples.hash for examples in run.assembly.evaluated]
    parts = [recjax.__version__, settings, hashlib.sha256(files).hexdigest(), *prepared]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder_of(recipe: Recipe, workdir: Path, split: str, task: str) -> Path:
    """Where the result of a task lies."""
    return workdir / split / task if len(recipe.mixture.evaluated) > 1 else workdir / split


def show(tables: Sequence[Table], note: str = "") -> None:
    """Print tables to standard output; one that is too wide is turned on its side."""
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    for table in tables:
        if not table.rows:
            continue
        table = table if table.width <= console.width else table.transposed()
        shown = Shown(title=table.title, title_justify="left")
        for at, name in enumerate(table.header):
            shown.add_column(name, justify="right" if at else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    if note:
        console.print(note, highlight=False, soft_wrap=True)


def comparison_table(found: Comparison, ours: str, theirs: str) -> Table:
    """Both means and the interval of their difference, a metric each line."""
    rows = [
        [
            name,
            number(found.ours[name]),
            number(found.theirs[name]),
            signed(d.mean),
            f"[{signed(d.low)}, {signed(d.high)}]",
        ]
        for name, d in found.difference.items()
    ]
    return Table(
        title=f"{found.users:,} users, paired bootstrap",
        header=["", ours, theirs, "difference", "95% interval"],
        rows=rows,
    )


def _saved(folder: Path, split: str) -> Path:
    return folder if (folder / PER_USER).is_file() else folder / split


def main(argv: list[str]) -> int:
    """Evaluate a checkpoint, or compare two evaluations."""
    parser = command.parser("evaluate")
    parser.add_argument("--split", default="test", choices=SPLITS, help="which held-out events to predict")
    parser.add_argument(
        "--checkpoint", default="", help='a step, "newest", or "max:ndcg@10"; default: best by the recipe\'s metric'
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two evaluated runs, A against B")
    if "--compare" in argv:
        args = parser.parse_args(argv)
        ours, theirs = args.compare
        found = compare(_saved(ours, args.split), _saved(theirs, args.split))
        named = ours.name != theirs.name
        show([comparison_table(found, ours.name if named else str(ours), theirs.name if named else str(theirs))])
        return 0
    command.start_jax()
    given = command.parse(parser, argv)
    if given.args.workdir is None:
        raise ConfigError("whose checkpoint is to be evaluated?", expected="--workdir=DIR, the folder of a run")
    workdir, split = given.args.workdir, given.args.split
    found = evaluate_run(given.recipe, workdir, split=split, checkpoint=given.args.checkpoint, cache=given.args.cache)
    if not found:
        print("This model ranks nobody; what there is to say of its codes stands in their artifact (recjax infer).")
    if cluster.is_lead():
        for task, result in found.items():
            metrics = result.metrics()
            world = "simulated data" if metrics["protocol"]["simulated"] else metrics["protocol"]["task"]
            place = folder_of(given.recipe, workdir, split, task) / METRICS
            note = f"{metrics['protocol']['users']:,} users of {world}, split {split}; {place}"
            tables = [systems_table(metrics), differences_table(metrics), buckets_table(metrics)]
            show([*tables, *hard_tables(metrics)], note)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
