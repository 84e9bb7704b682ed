"""Labels of a teacher that goes on learning: every row by the newest checkpoint that had not been trained on it.

A teacher that is trained in order of time, in one pass, leaves checkpoints behind. The rows between two of them are
labelled by the earlier one, which has seen only what came before, so that no label leaks through the teacher; rows
before the first checkpoint stay unlabelled. Beside these the first checkpoint labels all rows after it, too: students
that pin its version have the frozen teacher to compare with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recjax.core import saved
from recjax.core.checkpoint import restore_params
from recjax.core.errors import ArtifactError, ConfigError
from recjax.core.folder import new_folder
from recjax.data.label_store import publish
from recjax.data.rows_feed import RowsFeed
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.trained import Trained

KIND = "row_labels_ahead"


def label_ahead(run: Trained, out: Path, *, batch_size: int = 4096) -> Path:
    """A label store at `out` by the checkpoints of a run, each a version, called as its step.

    Raises `ConfigError` for a run that is not one pass in order of time.
    """
    recipe, examples = run.assembly.recipe, run.assembly.examples[0]
    folder, count = run.checkpoint.parent, examples.count("train")
    steps, feed = saved.steps(folder), recipe.feed
    is_one_pass = isinstance(feed, RowsFeed) and feed.order == "time" and not feed.balance and not feed.domains
    if not isinstance(feed, RowsFeed) or not is_one_pass or recipe.train_steps * feed.batch_size > count:
        raise ConfigError(
            "only a single pass in order of time can be labelled ahead",
            where=f"RowsFeed.order, TRAIN_STEPS = {recipe.train_steps}",
            expected=f"'time', and at most {count // feed.batch_size} steps",
        )
    config = RankerEvaluation(batch_size=batch_size)
    assembly = run.assembly
    scorer = RankerEvaluator(examples, split="train", config=config, model=assembly.model, mesh=assembly.mesh)
    with new_folder(out, error=ArtifactError) as store:
        for turn, (step, later) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
            shapes = assembly.abstract_state().params
            params, _ = restore_params(folder, shapes, step=step, vocabulary=assembly.vocabulary_hash)
            said = scorer.scores(assembly.with_facts(params), correct=False)
            begin, end = step * feed.batch_size, count if later is None else later * feed.batch_size
            parts = [(turn, np.arange(begin, end))]
            if not turn:
                parts.append((len(steps), np.arange(end, count)))  # as a frozen teacher
            for period, rows in parts:
                labels = {head: said[head][rows] for head in scorer.heads}
                publish(store, examples, labels, ids=rows, version=step, period=period, recipe=recipe.name)
    return out
