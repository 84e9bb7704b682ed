"""Requests of three kinds out of one log: what was searched for, what was next to an item, what was on a page.

    search    a query, from events that carry one, or else from judgments of queries and items
    similar   a source item, the one that the user had before
    page      nobody has said anything yet

Every event is a request of one kind: of a query where it has one, else of a source or a page by a hash. A judgment has
the time of its user's event with the item, and one without such an event a time that is drawn from those of all
events. Whose rows stand together is told by `asker` (a user, or a query that nobody in particular asked), and which
items cannot be negatives of a request by `apart`: those of the user, or those of the query.

A search page may ask with each key that is pressed: a share of the searches is then asked by the beginning of their
query, as it stood after some number of characters. What is meant is what was typed to the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.hashing import hashes, uniform
from recjax.data.tables import Tables

KINDS = ("search", "similar", "page")
ASKER, APART, TASK = "asker", "apart", "task"
_KIND, _TIME, _KEYS, _TYPED = 0x6B696E64, 0x74696D65, 0x6B657973, 0x74797065  # what a draw is for


def requests_of(
    tables: Tables, *, kinds: Sequence[str] = KINDS, min_label: float = 1.0, keys: float = 0.0, seed: int = 0
) -> pl.DataFrame:
    """user_id, item_id, timestamp, task, query, source_id, asker and apart of each request, in order of time.

    A share `keys` of the searches is asked while the query is being typed.
    Raises `DataError` for a log without times, and for search without queries.
    """
    if not tables.has_times:
        raise DataError("requests need times", where="interactions", expected="a column timestamp")
    events = _with_queries(tables).with_columns(
        before=pl.col("item_id").shift(1).over("user_id", order_by="order"),
        earlier=pl.col("timestamp").shift(1).over("user_id", order_by="order"),
    )
    is_similar = pl.Series(uniform(hashes(events.height, seed, _KIND)) < 0.5)
    has_source = is_similar & (pl.col("earlier") < pl.col("timestamp")).fill_null(False)
    events = events.with_columns(
        pl.when(pl.col("query").is_not_null())
        .then(pl.lit("search"))
        .when(has_source)
        .then(pl.lit("similar"))
        .otherwise(pl.lit("page"))
        .alias(TASK)
    ).with_columns(source_id=pl.when(pl.col(TASK) == "similar").then(pl.col("before")))
    found = events.select("user_id", "item_id", "timestamp", TASK, "query", "source_id")
    if "search" in kinds and not (found[TASK] == "search").any():
        found = pl.concat([found, _judged(tables, events, min_label, seed)], how="diagonal_relaxed")
    user, query = pl.format("user {}", "user_id"), pl.format("query {}", "query")
    found = (
        found.filter(pl.col(TASK).is_in(list(kinds)))
        .with_columns(
            pl.coalesce(user, query).alias(ASKER),
            pl.when(pl.col(TASK) == "search").then(query).otherwise(user).alias(APART),
        )
        .sort("timestamp", maintain_order=True)
    )
    return _while_typed(found, keys, seed) if keys else found


def _while_typed(requests: pl.DataFrame, keys: float, seed: int) -> pl.DataFrame:
    """The requests with a share `keys` of the queries cut after 1 to all but one of their characters, evenly."""
    begun, place = (uniform(hashes(requests.height, seed, draw)) for draw in (_KEYS, _TYPED))
    length = pl.col("query").str.len_chars()
    typed = 1 + (pl.Series(place) * (length - 1).cast(pl.Float64)).floor().cast(pl.Int64)
    cut = pl.col("query").str.slice(0, typed).str.strip_chars_end()
    return requests.with_columns(query=pl.when(pl.Series(begun < keys) & (length > 1)).then(cut).otherwise("query"))


def _with_queries(tables: Tables) -> pl.DataFrame:
    """The events with the text of their query, null where there is none."""
    events = tables.interactions
    if "query" in events.columns:
        return events.with_columns(_normal(pl.col("query")))
    if "query_id" in events.columns and tables.queries is not None:
        texts = tables.queries.select("query_id", _normal(pl.col("text")).alias("query"))
        return events.join(texts, on="query_id", how="left", maintain_order="left")
    return events.with_columns(query=pl.lit(None, pl.String))


def _judged(tables: Tables, events: pl.DataFrame, min_label: float, seed: int) -> pl.DataFrame:
    """Judgments of items of the log that count as relevant, each user's pair once, as requests."""
    if tables.queries is None or tables.relevance is None:
        missing = "queries" if tables.queries is None else "relevance"
        raise DataError("search needs queries and judgments", where=missing, expected=f"{missing}.parquet")
    judged = tables.relevance
    if not (judged["label"].dtype.is_numeric() or judged["label"].dtype == pl.Boolean):
        raise DataError("labels are no numbers", where="relevance, column label", expected="numbers")
    texts = tables.queries.select("query_id", _normal(pl.col("text")).alias("query"))
    judged = judged.filter(pl.col("label").cast(pl.Float64) >= min_label).join(
        texts, on="query_id", how="inner", maintain_order="left"
    )
    judged = judged.join(events.select("item_id").unique(), on="item_id", how="semi", maintain_order="left")
    user = pl.col("user_id") if "user_id" in judged.columns else pl.lit(None, events["user_id"].dtype)
    judged = judged.select(user.alias("user_id"), "item_id", "query").unique(maintain_order=True)
    first = events.group_by("user_id", "item_id").agg(pl.col("timestamp").min())
    judged = judged.join(first, on=["user_id", "item_id"], how="left", maintain_order="left")
    every = events["timestamp"].sort()
    place = (uniform(hashes(judged.height, seed, _TIME)) * len(every)).astype(np.int64)
    drawn = every.gather(np.minimum(place, len(every) - 1))
    return judged.with_columns(pl.col("timestamp").fill_null(drawn), pl.lit("search").alias(TASK))


def _normal(text: pl.Expr) -> pl.Expr:
    """Lower case, single spaces; null where nothing is left."""
    text = text.cast(pl.String).str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    return pl.when(text != "").then(text)
