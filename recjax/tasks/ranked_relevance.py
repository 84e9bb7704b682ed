"""The questions of search relevance: judged items of a query, divided into splits by the query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.hashing import hashed_with, hashes, uniform
from recjax.data.tables import Tables
from recjax.data.vocab import stable_hash
from recjax.tasks.prompted_log import TEST, TRAIN, VALID, Log
from recjax.tasks.prompted_ranking import Relevance
from recjax.tasks.ranked_questions import Asked

_SPLIT, _CHOSEN, _DRAWN = 0x73706C69, 0x63686F73, 0x64726177  # what a draw is for


class Judged(NamedTuple):
    """The queries that have judgments, and what is asked of them; the `user` of a question is the number of a query."""

    queries: pl.DataFrame
    texts: list[str]
    counts: dict[str, int]
    asked: dict[int, list[Asked]]

    def questions(self, period: int) -> Iterator[Asked]:
        """What is asked in a period, query by query."""
        return iter(self.asked[period])


def judged(task: Relevance, log: Log, tables: Tables) -> Judged:
    """The judgments of these tables as questions.

    Queries that are spelt alike but for case and spaces are one; of several judgments of a query and an item the
    highest counts. Raises `DataError` when there are no queries or judgments, or their labels are no numbers.
    """
    if tables.queries is None or tables.relevance is None:
        missing = "queries" if tables.queries is None else "relevance"
        mend = "bring both tables, or take the task out of the mixture"
        raise DataError(
            f"the task {task.name} needs judgments", where=missing, expected=f"{missing}.parquet", mend=mend
        )
    label = tables.relevance["label"]
    if not (label.dtype.is_numeric() or label.dtype == pl.Boolean):
        raise DataError(
            f"the task {task.name} needs grades", where="relevance, column label", expected="numbers, such as 0 and 1"
        )
    text = pl.col("text").cast(pl.String).fill_null("").str.strip_chars().str.replace_all(r"\s+", " ")
    queries = tables.queries.select("query_id", text).filter(pl.col("text") != "")
    queries = queries.with_columns(key=pl.col("text").str.to_lowercase()).sort("key", "query_id")
    numbers = pl.DataFrame({"item_id": log.item_ids, "item": np.arange(len(log.item_ids))})
    pairs = (
        tables.relevance.select("query_id", "item_id", pl.col("label").cast(pl.Float64))
        .join(queries.select("query_id", "key"), on="query_id", how="inner")
        .join(numbers, on="item_id", how="inner")
        .group_by("key", "item")
        .agg(pl.col("label").max())
        .sort("key", "item")
    )
    found = queries.unique("key", keep="first", maintain_order=True).filter(pl.col("key").is_in(pairs["key"].implode()))
    counts = {"judgments": tables.relevance.height, "pairs": pairs.height, "queries": found.height}
    drawn = uniform(hashed_with(np.repeat(hashes(1, task.seed, _SPLIT), found.height), stable_hash(found["key"])))
    asked: dict[int, list[Asked]] = {TRAIN: [], VALID: [], TEST: []}
    groups = pairs.partition_by("key", maintain_order=True)
    for query, (group, draw) in enumerate(zip(groups, drawn.tolist(), strict=True)):
        held = task.valid_fraction + task.test_fraction
        period = VALID if draw < task.valid_fraction else TEST if draw < held else TRAIN
        asked[period].append(_asked(task, log, query, group, is_training=period == TRAIN))
    return Judged(found, found["text"].to_list(), counts, asked)


def _asked(task: Relevance, log: Log, query: int, pairs: pl.DataFrame, *, is_training: bool) -> Asked:
    """The questions about the pairs of a query, chosen by hash, and about drawn items."""
    items, labels = pairs["item"].to_numpy(), (pairs["label"].to_numpy() >= task.min_label).astype(np.int64)
    order = np.argsort(hashed_with(np.repeat(hashes(1, task.seed, _CHOSEN, query), len(items)), items), kind="stable")
    each, known = 1 + task.negatives, set(items.tolist())
    chosen = np.sort(order[: task.per_user if is_training else max(task.candidates // each, 1)])
    drawn = hashes(2 * len(items) + 2 * each * len(chosen), task.seed, _DRAWN, query) % np.uint64(len(log.texts))
    unjudged = [item for item in dict.fromkeys(drawn.tolist()) if item not in known]
    unjudged = unjudged[: len(chosen) * task.negatives]
    questions = [{"item": log.texts[item]} for item in [*items[chosen].tolist(), *unjudged]]
    right = [*labels[chosen].tolist(), *[0] * len(unjudged)]
    return Asked(query, 0, questions, right)
