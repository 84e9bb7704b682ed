"""Rows judged before they are trained on: every row by the newest checkpoint that had not seen it.

A ranker that is trained in order of time, in one pass, leaves checkpoints behind. The rows between two of them are
scored by the earlier one, which has seen only what came before; rows before the first checkpoint are scored by none.
Beside these the first checkpoint scores all rows after it, too: a model that is updated no more.

    label_ahead     a store of these scores, for students of a teacher that goes on learning: no label leaks through it,
                    and students that pin the first version have a frozen teacher
    progressive     metrics of these scores, day by day: progressive validation, and what is forgotten without updates
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recjax.core import saved
from recjax.core.checkpoint import restore_params
from recjax.core.errors import ArtifactError, ConfigError
from recjax.core.folder import new_folder
from recjax.data.label_store import publish
from recjax.data.rows_feed import RowsFeed
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.ranker_metrics import head_metrics
from recjax.tables import Table, number
from recjax.trained import Trained

KIND = "row_labels_ahead"
_SHOWN = ("auc", "gauc", "log_loss", "calibration")


class Day(NamedTuple):
    """What the checkpoint of `step` says of all training rows, `said[head]` [n]; rows `begin` to `end` - 1 come between
    it and the next one."""

    step: int
    begin: int
    end: int
    said: dict[str, np.ndarray]


def label_ahead(run: Trained, out: Path, *, batch_size: int = 4096) -> Path:
    """A label store at `out` by the checkpoints of a run, each a version, called as its step.

    Raises `ConfigError` for a run that is not one pass in order of time.
    """
    examples, recipe, scorer = run.assembly.examples[0], run.assembly.recipe, scorer_of(run, batch_size)
    count, days = examples.count("train"), len(saved.steps(run.checkpoint.parent))
    with new_folder(out, error=ArtifactError) as store:
        for turn, day in enumerate(days_of(run, scorer)):
            parts = [(turn, np.arange(day.begin, day.end))]
            if not turn:
                parts.append((days, np.arange(day.end, count)))  # as a frozen teacher
            for period, rows in parts:
                labels = {head: day.said[head][rows] for head in scorer.heads}
                publish(store, examples, labels, ids=rows, version=day.step, period=period, recipe=recipe.name)
    return out


def progressive(run: Trained, *, batch_size: int = 4096) -> Table:
    """Each day of a run by the model that had been trained until it, and by that of the first day, of its first head.

    Raises `ConfigError` for a run that is not one pass in order of time.
    """
    scorer, first, rows = scorer_of(run, batch_size), None, []
    for number_of, day in enumerate(days_of(run, scorer)):
        head, first = scorer.heads[0], day if first is None else first
        mine = np.arange(day.begin, day.end)
        mine = mine[scorer.rows.label[mine, 0] >= 0]
        if not len(mine):
            continue
        part, _ = scorer.rows.take(mine)
        line = [str(number_of + 1), f"{day.step:,}", f"{len(mine):,}"]
        for model in (day, first):
            found, _ = head_metrics(part, 0, model.said[head][mine])
            line += [number(float(np.mean(found[name]))) for name in _SHOWN]
        rows.append(line)
    names = [f"{name}, {model}" for model in ("updated", "as on day 1") for name in _SHOWN]
    return Table(title="Each day before it is trained on", header=["day", "step", "rows", *names], rows=rows)


def scorer_of(run: Trained, batch_size: int) -> RankerEvaluator:
    """What scores the training rows. Raises `ConfigError` for a run that is not one pass in order of time."""
    recipe, count = run.assembly.recipe, run.assembly.examples[0].count("train")
    feed = recipe.feed
    is_one_pass = isinstance(feed, RowsFeed) and feed.order == "time" and not feed.balance and not feed.domains
    if not isinstance(feed, RowsFeed) or not is_one_pass or recipe.train_steps * feed.batch_size > count:
        raise ConfigError(
            "only a single pass in order of time can be judged ahead of it",
            where=f"RowsFeed.order, TRAIN_STEPS = {recipe.train_steps}",
            expected=f"'time', and at most {count // feed.batch_size} steps",
        )
    config, assembly = RankerEvaluation(batch_size=batch_size), run.assembly
    return RankerEvaluator(assembly.examples[0], split="train", config=config, model=assembly.model, mesh=assembly.mesh)


def days_of(run: Trained, scorer: RankerEvaluator) -> Iterator[Day]:
    """The checkpoints of a run in order; the rows of the last are all that are left."""
    assembly, folder = run.assembly, run.checkpoint.parent
    steps, batch = saved.steps(folder), assembly.recipe.feed.batch_size
    shapes, count = assembly.abstract_state().params, assembly.examples[0].count("train")
    for step, later in zip(steps, [*steps[1:], None], strict=True):
        params, _ = restore_params(folder, shapes, step=step, vocabulary=assembly.vocabulary_hash)
        end = count if later is None else later * batch
        yield Day(step, step * batch, end, scorer.scores(assembly.with_facts(params), correct=False))
