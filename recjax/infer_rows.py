"""Artifacts of what a ranker says of rows, and of the tables that it says it with (`recjax.infer`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from recjax.data import answers
from recjax.data.field_tables import write_tables
from recjax.data.label_store import write_labels
from recjax.inference import Inference
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator


def row_labels(asked: Inference) -> None:
    """The logit of every head for every training row, for students."""
    ranker = _ranker(asked, "train")
    said = ranker.scores(asked.params, correct=False)
    write_labels(asked.out, asked.examples, {head: said[head] for head in ranker.heads}, **asked.origin)


def held_out(asked: Inference) -> None:
    """`answers`: the logit of every head for every held-out row, with its user and the right answer."""
    users, labels, logits = {}, {}, {}
    ids = asked.examples.user_ids()
    for split in answers.SPLITS:
        ranker = _ranker(asked, split)
        rows = ranker.reader
        users[split] = [ids[user] for user in rows.column("user_index").tolist()]
        labels[split] = dict(zip(rows.heads, rows.column("labels").T, strict=True))
        said = ranker.scores(asked.params)
        logits[split] = {head: said[head] for head in ranker.heads}
    answers.write_answers(asked.out, users, labels, logits, **asked.origin)


def field_tables(asked: Inference) -> None:
    """The vectors of the values of the fields, for later rankers."""
    bound: Any = asked.model.bind(asked.params)
    table = np.asarray(asked.params["table"])
    write_tables(asked.out, asked.examples, table[:, : bound.table_width], **asked.origin)


def _ranker(asked: Inference, split: str) -> RankerEvaluator:
    config = RankerEvaluation(batch_size=asked.batch_size)
    return RankerEvaluator(asked.examples, split=split, config=config, model=asked.model, mesh=asked.mesh)
