"""`recjax infer`: run a checkpoint over a task and write what comes out as an artifact.

    recommendations   user_index int64 [n], rows int32 [n, k], scores float32 [n, k], best first (row 0 and -inf: none)
    user_vectors      user_index int64 [n], vectors float32 [n, d]
    item_vectors      rows int32 [num_items], vectors float32 [num_items, d]
    teacher_rankings  a list for every event of the training split, for students (`recjax.data.teacher`)
    codes             a few codes for every item, from a model that quantises content (`recjax.data.codes`)
    row_labels        the logit of every head of a ranker for every training row, for students (`data.label_store`)
    row_labels_ahead  the same of a ranker that goes on learning, by many checkpoints (`recjax.prequential`)
    field_tables      the vectors of the values of a ranker's fields, for later rankers (`data.field_tables`)
    answers           the logit of every head of a ranker for every held-out row, with its user (`data.answers`)

A score is the inner product of a user vector and an item vector, or the log-probability of an item that takes several
tokens to name, which has no vector. A user is whoever the task asks about: a history, or a query. Every user of the
split stands in it once, in the order of `eval_batches` (longest prompt first); rows that only filled a batch are
dropped. Results go to disk batch by batch. It computes no metrics: that is `recjax evaluate`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recjax import cli, trained
from recjax.core.artifact import ArtifactWriter, open_artifact, read_artifact
from recjax.core.errors import ConfigError, UnservableError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data import answers
from recjax.data.batch import PAD
from recjax.data.codes import read_codes, write_codes
from recjax.data.examples import Examples
from recjax.data.field_tables import write_tables
from recjax.data.label_store import KIND as ROW_LABELS
from recjax.data.label_store import describe, write_labels
from recjax.data.pipeline import eval_batches
from recjax.data.sampled import HeldExamples
from recjax.data.spelling import Prompts
from recjax.data.vocab import FIRST_ITEM
from recjax.prequential import KIND as AHEAD
from recjax.prequential import label_ahead
from recjax.quantise import codes_by
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.rankings import write_rankings
from recjax.recommend import TIMES, batch_of, make_recommend
from recjax.retrieve import Catalogue, Rows, encode

KINDS = (
    "recommendations",
    "user_vectors",
    "item_vectors",
    "teacher_rankings",
    "codes",
    "row_labels",
    "answers",
    "field_tables",
    AHEAD,
)
_MOST_LISTED = 20
_ITEM_BLOCK = 65_536


def infer(
    model: Functional,
    params: Params,
    examples: Examples,
    *,
    kind: str,
    out: str | os.PathLike[str],
    history_length: int,
    times: str = "none",
    prompts: Prompts | None = None,
    catalogue: Catalogue | None = None,
    split: str = "test",
    k: int = 100,
    exclude_seen: bool = True,
    batch_size: int = 256,
    extend: str | os.PathLike[str] = "",
    mesh: Mesh | None = None,
    recipe: str = "",
    step: int = 0,
) -> Path:
    """Write an artifact of `kind` at `out` and return its path.

    `prompts` is how a model of tokens is asked, and `catalogue` how its items are found, where that is not by their
    rows. `k` is cut to the number of items, or to what the catalogue always finds; `batch_size` is rounded up to what
    `mesh` can divide. `extend` are codes of a smaller catalogue, which are kept. Raises `ConfigError` for an unknown
    kind, `ArtifactError` when `out` exists, `ExamplesError` for a split without targets and `UnservableError` for what
    the model cannot give.
    """
    if kind not in KINDS or kind == AHEAD:
        raise ConfigError(f"cannot infer {kind!r}", expected=f"one of: {', '.join(KINDS)}")
    if jax.process_count() > 1:
        raise ConfigError("infer runs in one process", where=f"{jax.process_count()} processes")
    if extend and kind != "codes":
        raise ConfigError(f"{kind} cannot be extended", where=f"extend = {str(extend)!r}", expected="kind = 'codes'")
    if k < 1 or batch_size < 1:
        raise ConfigError(f"k is {k} and batch_size {batch_size}", expected="at least 1")
    if kind == "row_labels":
        config = RankerEvaluation(batch_size=batch_size)
        teacher = RankerEvaluator(examples, split="train", config=config, model=model, mesh=mesh)
        said = teacher.scores(params, correct=False)
        write_labels(out, examples, {head: said[head] for head in teacher.heads}, recipe=recipe, step=step)
        return Path(out)
    if kind == "answers":
        answers.write_answers(out, *_answers(model, params, examples, batch_size, mesh), recipe=recipe, step=step)
        return Path(out)
    if kind == "field_tables":
        bound: Any = model.bind(params)
        table, width = np.asarray(params["table"]), bound.table_width
        write_tables(out, examples, table[:, :width], recipe=recipe, step=step)
        return Path(out)
    vocab = examples.vocab
    k = min(k, (catalogue or Rows(vocab.num_items)).most)
    if catalogue is not None and kind in ("item_vectors", "teacher_rankings"):
        raise UnservableError(
            f"there are no {kind} of a model that names an item in several tokens", mend="infer recommendations"
        )
    if kind == "teacher_rankings":
        if times != "none":
            raise ConfigError("lists for students are made by models that read no times", where=f"times = {times!r}")
        with mesh.activate() if mesh else contextlib.nullcontext():
            return write_rankings(
                model,
                params,
                examples,
                out=out,
                history_length=history_length,
                k=min(k, _MOST_LISTED),
                exclude_seen=exclude_seen,
                batch_size=min(batch_size, 64),
                mesh=mesh,
                recipe=recipe,
                step=step,
            )
    about: dict[str, Any] = {"task": examples.manifest.get("task"), "examples": examples.hash}
    if kind == "codes":
        old = read_codes(extend) if extend else None
        write_codes(out, codes_by(model, params, vocab, old=old, mesh=mesh), recipe=recipe, step=step, about=about)
        return Path(out)
    if kind != "item_vectors":
        about |= {"split": split, "history_length": history_length}
    if kind == "recommendations":
        about |= {"k": k, "exclude_seen": exclude_seen}
    facts = {"recipe": recipe, "step": step, "vocabulary_hash": vocab.hash, "about": about}
    with open_artifact(out, kind=kind, **facts) as writer, mesh.activate() if mesh else contextlib.nullcontext():
        if kind == "item_vectors":
            parts = mesh.size_of("batch") if mesh else 1
            _write_items(writer, model, params, vocab.num_items, len(TIMES[times]), parts)
            return Path(out)
        if kind == "recommendations":
            run = make_recommend(model, num_items=vocab.num_items, k=k, catalogue=catalogue)
            names = ("scores", "rows")
        else:
            names, run = (
                ("vectors",),
                lambda params, prompt, seen, *times: encode(model, params, batch_of(prompt, *times))[:1],
            )
        parts = mesh.size_of("batch") if mesh else 1
        batch_size = -(-batch_size // parts) * parts
        asked, slots = examples, history_length
        if prompts is not None:
            held = HeldExamples(examples.path, examples.manifest, None, 0)
            asked = held.through(split, lambda records: prompts.spell(records, history_length))
            slots = prompts.slots(history_length)
        batches = eval_batches(asked, split, batch_size=batch_size, history_length=slots, times=times)
        for users, arrays in _results(jax.jit(run), params, batches, mesh, exclude_seen, TIMES[times]):
            writer.append("user_index", users)
            for name, array in zip(names, arrays, strict=True):
                writer.append(name, array)
    return Path(out)


def _answers(
    model: Functional, params: Params, examples: Examples, batch_size: int, mesh: Mesh | None
) -> tuple[dict[str, Any], ...]:
    """Users, right answers and logits of the held-out rows, split by split."""
    users, labels, logits = {}, {}, {}
    ids = examples.user_ids()
    for split in answers.SPLITS:
        config = RankerEvaluation(batch_size=batch_size)
        ranker = RankerEvaluator(examples, split=split, config=config, model=model, mesh=mesh)
        rows = ranker.reader
        users[split] = [ids[user] for user in rows.column("user_index").tolist()]
        labels[split] = dict(zip(rows.heads, rows.column("labels").T, strict=True))
        said = ranker.scores(params)
        logits[split] = {head: said[head] for head in ranker.heads}
    return users, labels, logits


def _results(
    run: Callable[..., Any],
    params: Params,
    batches: Iterator[Any],
    mesh: Mesh | None,
    exclude_seen: bool,
    times: Sequence[str],
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """User numbers and results of every batch, filling rows dropped; the next batch is made while the last is read."""
    waiting: tuple[np.ndarray, np.ndarray, Any] | None = None

    def read(batch: tuple[np.ndarray, np.ndarray, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
        users, real, arrays = batch
        return users[real], [np.asarray(array)[real] for array in arrays]

    for batch in batches:
        seen = batch["seen_ids"] if exclude_seen else np.full_like(batch["seen_ids"][:, :1], PAD)
        inputs = {"history_ids": batch["history_ids"], "seen_ids": seen}
        if "history_time" in times:
            inputs["history_time"] = batch["history_time"].astype(np.int32)
        if "query_time" in times:
            last = np.maximum((batch["segment_ids"] > 0).sum(axis=1) - 1, 0)
            inputs["query_time"] = batch["query_time"][np.arange(len(last)), last].astype(np.int32)
        placed = mesh.put_batch(inputs) if mesh else inputs
        started = run(params, *(placed[name] for name in inputs))
        if waiting is not None:
            yield read(waiting)
        waiting = batch["user_index"], batch["row_weight"] > 0, started
    if waiting is not None:
        yield read(waiting)


def _write_items(
    writer: ArtifactWriter, model: Functional, params: Params, num_items: int, times: int, parts: int
) -> None:
    # The table is the same for any history; a model of other item vectors for every user has none.
    nothing = np.full((parts, 1), PAD, np.int32)
    table = jax.jit(lambda params, *inputs: encode(model, params, batch_of(*inputs))[1])(
        params, nothing, *(nothing, nothing[:, 0])[:times]
    )
    if table.ndim != 2:
        raise UnservableError("item vectors of this model depend on who asks and when", mend="infer recommendations")
    for start in range(FIRST_ITEM, FIRST_ITEM + num_items, _ITEM_BLOCK):
        end = min(start + _ITEM_BLOCK, FIRST_ITEM + num_items)
        writer.append("rows", np.arange(start, end, dtype=np.int32))
        writer.append("vectors", np.asarray(table[start:end], np.float32))


def infer_run(run: trained.Trained, *, kind: str, out: Path, task: str = "", **options: Any) -> Path:
    """`infer` over a task of a finished run, the first by default, as its recipe says; `options` are those of `infer`.

    Raises `ConfigError` for a task that the recipe does not have.
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
    flags.add_argument("--kind", default=KINDS[0], choices=KINDS, help=f"what to write (default {KINDS[0]})")
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
