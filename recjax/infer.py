"""`recjax infer`: run a checkpoint over a task and write what comes out as an artifact.

    recommendations   user_index int64 [n], rows int32 [n, k], scores float32 [n, k], best first (row 0 and -inf: none)
    user_vectors      user_index int64 [n], vectors float32 [n, d]
    item_vectors      rows int32 [num_items], vectors float32 [num_items, d]
    teacher_rankings  a list for every event of the training split, for students (`recjax.data.teacher`)
    codes             a few codes for every item, from a model that quantises content (`recjax.data.codes`)
    row_labels        the logit of every head of a ranker for every training row, for students (`data.label_store`)
    row_labels_ahead  the same of a ranker that goes on learning, by many checkpoints (`recjax.prequential`)
    field_tables      the vectors of the values of a ranker's fields, for later rankers (`data.field_tables`)
    answers           the logit of every head of a ranker for every held-out row, with its user, or what a model of
                      sequences says of the candidates that it is asked about (`data.answers`)

It computes no metrics: that is `recjax evaluate`. What the first three hold in detail, and in which order, says
`recjax.infer_catalogue`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from recjax import cli, infer_asked, infer_catalogue, infer_rows, trained
from recjax.core.artifact import read_artifact
from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Params
from recjax.data.examples import Examples
from recjax.data.label_store import KIND as ROW_LABELS
from recjax.data.label_store import describe
from recjax.inference import Inference
from recjax.prequential import KIND as AHEAD
from recjax.prequential import label_ahead


def _answers(asked: Inference) -> None:
    """Of a model that is told candidates with each user, or of a ranker of rows."""
    (infer_asked.candidates if infer_asked.FIELD in asked.examples.manifest else infer_rows.held_out)(asked)


KINDS: dict[str, Callable[[Inference], None]] = {
    "recommendations": infer_catalogue.recommendations,
    "user_vectors": infer_catalogue.user_vectors,
    "item_vectors": infer_catalogue.item_vectors,
    "teacher_rankings": infer_catalogue.teacher_rankings,
    "codes": infer_catalogue.codes,
    ROW_LABELS: infer_rows.row_labels,
    "answers": _answers,
    "field_tables": infer_rows.field_tables,
}
_ALL = (*KINDS, AHEAD)  # the last needs more than one checkpoint


def infer(
    model: Functional, params: Params, examples: Examples, *, kind: str, out: str | os.PathLike[str], **options: Any
) -> Path:
    """Write an artifact of `kind` at `out` and return its path; `options` are those of `Inference`.

    Raises `ConfigError` for an unknown kind, `ArtifactError` when `out` exists, `ExamplesError` for a split without
    targets and `UnservableError` for what the model cannot give.
    """
    if kind not in KINDS:
        raise ConfigError(f"cannot infer {kind!r}", expected=f"one of: {', '.join(_ALL)}")
    if jax.process_count() > 1:
        raise ConfigError("infer runs in one process", where=f"{jax.process_count()} processes")
    asked = Inference(model=model, params=params, examples=examples, out=out, **options)
    if asked.extend and kind != "codes":
        where = f"extend = {str(asked.extend)!r}"
        raise ConfigError(f"{kind} cannot be extended", where=where, expected="kind = 'codes'")
    KINDS[kind](asked)
    return Path(out)


def infer_run(run: trained.Trained, *, kind: str, out: Path, task: str = "", **options: Any) -> Path:
    """`infer` over a task of a finished run, the first by default, as its recipe says.

    `options` are those of `Inference`. Raises `ConfigError` for a task that the recipe does not have.
    """
    recipe, tasks = run.assembly.recipe, {e.manifest["task"]: e for e in run.assembly.evaluated}
    if task and task not in tasks:
        raise ConfigError(f"the recipe has no task {task!r}", expected=f"one of: {', '.join(tasks)}")
    if kind == AHEAD:
        return label_ahead(run, out)
    return infer(
        run.assembly.model,
        run.params,
        tasks[task] if task else run.assembly.evaluated[0],
        kind=kind,
        out=out,
        history_length=recipe.feed.history_length,
        times=recipe.feed.times,
        prompts=run.assembly.prompts,
        catalogue=run.assembly.catalogue,
        mesh=run.assembly.mesh,
        recipe=recipe.name,
        step=run.step,
        **options,
    )


def main(argv: list[str]) -> int:
    """`recjax infer`."""
    flags = trained.parser("infer")
    flags.add_argument("--kind", default=_ALL[0], choices=_ALL, help=f"what to write (default {_ALL[0]})")
    flags.add_argument("--split", default="test", choices=("test", "valid"), help="whose users (default test)")
    flags.add_argument("--task", default="", help="which task of a mixture (default: the first)")
    flags.add_argument("--k", type=int, default=100, help="recommendations for each user (default 100)")
    flags.add_argument("--keep_seen", action="store_true", help="recommend what a user already had as well")
    flags.add_argument("--batch_size", type=int, default=256, help="users at a time (default 256)")
    flags.add_argument("--extend", default="", metavar="CODES", help="codes of a smaller catalogue, which are kept")
    run, args = trained.from_command_line(flags, argv)
    path = infer_run(
        run,
        kind=args.kind,
        out=args.out,
        task=args.task,
        split=args.split,
        k=args.k,
        exclude_seen=not args.keep_seen,
        batch_size=args.batch_size,
        extend=args.extend,
    )
    if args.kind in (ROW_LABELS, AHEAD):
        print(f"{path}: {describe(path)}")
        return 0
    shapes = {name: a["shape"] for name, a in read_artifact(path).manifest["arrays"].items()}
    print(f"{path}: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
