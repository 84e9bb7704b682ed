"""Texts as the work of a task: tokens to rows of the table, what stands beside them, and what the manifest says.

A document is a history of tokens: prepared examples hold `items`, the rows of the tokens. Where not every token is
predicted they have `loss`, 1 for each that is; where several questions share a prompt, `branch`, the number of the
question that a token belongs to. Ranking records hold the shared part of a prompt as `items`, and the questions about
each candidate one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.record import Field
from recjax.data.tables import Tables
from recjax.data.text import Tokenizer
from recjax.data.vocab import ItemVocab
from recjax.prompts.chat import ANSWER, Rendered
from recjax.prompts.tokenizer import rows_of, vocabulary_of
from recjax.tasks.prompted import PERIODS, Prompted
from recjax.tasks.work import Example, Work, columns_of

TEXT = (Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1))
MASKED = (*TEXT, Field(name="loss", dtype="int32", rank=1))
BRANCHED = (*MASKED, Field(name="branch", dtype="int32", rank=1))
RANKED = (
    *TEXT,
    *(Field(name=name, dtype="int32", rank=1) for name in ("suffixes", "suffix_lengths", "labels")),
    *(Field(name=name, dtype="int32", rank=0) for name in ("history_events", "total_events")),
)


def document(user_index: int, tokens: np.ndarray) -> Example:
    """An example of which every token is predicted."""
    return {"user_index": user_index, "items": rows_of(tokens)}


def masked(user_index: int, rendered: Rendered, *, mask: bool = True) -> Example:
    """An example of which the answers are predicted, or all of it without `mask`."""
    loss = rendered.mask(ANSWER) if mask else np.ones(len(rendered.tokens), np.int32)
    return {**document(user_index, rendered.tokens), "loss": loss}


def branched(user_index: int, rendered: Rendered, branch: np.ndarray, *, mask: bool = True) -> Example:
    """The same for a text with branches, each of which goes on where branch 0 ends."""
    example = masked(user_index, rendered, mask=mask)
    # What stands before the first token of a later branch is not what it follows.
    example["loss"][np.flatnonzero(np.diff(branch, prepend=0) * (branch > 1))] = 0
    return {**example, "branch": branch}


def text_work(
    task: Prompted,
    tables: Tables,
    *,
    tokenizer: Tokenizer,
    examples: Mapping[str, Sequence[Example]],
    schemas: Mapping[str, Sequence[Field]],
    users: pl.DataFrame,
    whole: bool,
    facts: Mapping[str, Any],
) -> Work:
    """The work of a task whose examples are written; raises `DataError` when there are none to train on.

    `users` (user_index, user_id) says what the examples are of; one that is `whole` is never to be cut into windows.
    """
    if not examples["train"]:
        raise DataError(
            "there is nothing to train on",
            where=f"{task.name}, data {task.data.path or 'simulated'}",
            expected="events of the training period, or documents",
            mend="bring more data, or ask less of a history",
        )
    vocab = vocabulary_of(tokenizer)
    counts = {split: _counted(examples.get(split, ())) for split in PERIODS}
    longest = max(len(one["items"]) for one in examples["train"])
    return Work(
        name=task.name,
        raw={split: columns_of(examples.get(split, ()), schemas[split]) for split in PERIODS},
        steps=(),
        schemas={split: tuple(schemas[split]) for split in PERIODS},
        vocab=vocab,
        items=_pieces(vocab, examples["train"]),
        users=users,
        facts={
            "simulated": tables.simulated,
            "times": False,
            **({"longest_whole": longest} if whole else {}),
            "branches": max(int(one["branch"].max()) if "branch" in one else 0 for one in examples["train"]),
            "counts": counts,
            "notes": [*tables.notes],
            "warnings": [*tables.warnings],
            **facts,
        },
        text=tokenizer,
    )


def _counted(examples: Sequence[Example]) -> dict[str, int]:
    """Examples, tokens, and those that are predicted or asked about."""
    found = {"examples": len(examples), "tokens": sum(len(one["items"]) for one in examples)}
    if examples and "loss" in examples[0]:
        found["predicted"] = sum(int(one["loss"][1:].sum()) for one in examples)
    if examples and "labels" in examples[0]:
        found["candidates"] = sum(len(one["labels"]) for one in examples)
    return found


def _pieces(vocab: ItemVocab, examples: Sequence[Example]) -> pl.DataFrame:
    """The table of the tokens, with how often each is read in training."""
    counts = np.zeros(vocab.num_rows, np.int64)
    for example in examples:
        counts += np.bincount(example["items"], minlength=vocab.num_rows)
    row = vocab.encode(list(vocab.ids))
    return pl.DataFrame({"row": row, "item_id": list(vocab.ids), "train_count": counts[row]})
