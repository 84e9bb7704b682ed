"""A data directory for search and recommendation from a log whose users tag items: every tag is a query.

    python benchmarks/tags_as_queries.py SOURCE OUT [--describe genres genres+year] [--min-users 4] [--min-items 2]

SOURCE is a folder with `tag_assignments.parquet`, `all_artists.parquet` (Last.fm of HetRec 2011: an event is the first
time a user tagged an artist), or with `interactions.parquet`, `items.parquet` and perhaps `tags.parquet` (MovieLens).
OUT, which must not exist, gets interactions, items, queries (query_id, text) and relevance (query_id, item_id, label 1,
user_id): whose judgment it is, so that `Search.drop_leaks` can keep held-out actions out of search training.

--describe makes queries of columns of the items as well, which are nobody's judgments: every value is a query for the
items that have it, and "genres+year" one for every pair of values of an item. Items need --min-users users in the log,
queries --min-items items.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recjax.data.directory import write_directory

_LABEL = 1


def main() -> None:
    """Read, filter, write, and say how much there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--describe", nargs="*", default=[], metavar="COLUMN[+COLUMN]")
    parser.add_argument("--min-users", type=int, default=4)
    parser.add_argument("--min-items", type=int, default=2)
    args = parser.parse_args()
    read = lastfm if (args.source / "tag_assignments.parquet").exists() else movielens
    limits = {"min_users": args.min_users, "min_items": args.min_items}
    frames = directory(*read(args.source), describe=args.describe, **limits)
    write_directory(args.out, frames)
    print(args.out, *(f"{name}={frame.height:,}" for name, frame in frames.items()))


def lastfm(source: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Events, items and tags of HetRec's Last.fm; an event has the day of the user's first tag for the artist."""
    names = {"hetrec_user_id": "user_id", "hetrec_artist_id": "item_id"}
    tags = pl.read_parquet(source / "tag_assignments.parquet").rename(names)
    day = pl.col("date").min().cast(pl.Datetime("ms")).dt.timestamp("ms") // 1000
    events = tags.group_by("user_id", "item_id", maintain_order=True).agg(timestamp=day)
    items = pl.read_parquet(source / "all_artists.parquet").rename({"hetrec_artist_id": "item_id"})
    return events, items, tags.select("user_id", "item_id", "tag")


def movielens(source: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Events, items and tags of a MovieLens log; no tags where there is no such table."""
    events = pl.read_parquet(source / "interactions.parquet")
    items = pl.read_parquet(source / "items.parquet")
    if (source / "tags.parquet").exists():
        tags = pl.read_parquet(source / "tags.parquet").select("user_id", "item_id", "tag")
    else:
        tags = pl.DataFrame(schema={"user_id": pl.Int64, "item_id": pl.Int64, "tag": pl.String})
    return events, items, tags


def directory(
    events: pl.DataFrame,
    items: pl.DataFrame,
    tags: pl.DataFrame,
    *,
    describe: Sequence[str] = (),
    min_users: int = 1,
    min_items: int = 1,
) -> dict[str, pl.DataFrame]:
    """The tables of the data directory. Tags that differ in case or spaces alone are one query."""
    often = events.group_by("item_id").agg(pl.col("user_id").n_unique().alias("users"))
    kept = often.filter(pl.col("users") >= min_users).select(pl.col("item_id").cast(pl.Int64))
    events, items, tags = (_whole(f).join(kept, on="item_id", how="semi") for f in (events, items, tags))
    judged = [tags.select("user_id", "item_id", text="tag")]
    judged += [described(items, columns.split("+")) for columns in describe]
    text = pl.col("text").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    found = pl.concat(judged).with_columns(text).filter(pl.col("text") != "").unique(maintain_order=True)
    sizes = found.group_by("text").agg(pl.col("item_id").n_unique().alias("items"))
    texts = sizes.filter(pl.col("items") >= min_items).select("text").sort("text")
    queries = texts.select(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("query_id"), "text")
    relevance = found.join(queries, on="text", how="inner", maintain_order="left")
    relevance = relevance.select("query_id", "item_id", pl.lit(_LABEL).alias("label"), "user_id")
    return {"interactions": events, "items": items, "queries": queries, "relevance": relevance}


def described(items: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """user_id (nobody), item_id, text: each value of a column, or each combination of different values of several.

    A column holds numbers, lists of texts, or texts with values divided by "|". A column given twice running gives
    every two of its values once.
    """
    found, names = items.select("item_id"), []
    for number, column in enumerate(columns):
        values, name = items[column], f"{column} {number}"
        lists = values if values.dtype == pl.List else values.cast(pl.String).str.split("|")
        frame = pl.DataFrame({"item_id": items["item_id"], name: lists}).explode(name)
        frame = frame.filter(pl.col(name).str.strip_chars() != "")
        found = found.join(frame, on="item_id", how="inner", maintain_order="left")
        if names:
            before, twice = pl.col(names[-1]), columns[number - 1] == column
            found = found.filter(before < pl.col(name) if twice else before != pl.col(name))
        names.append(name)
    text = pl.concat_str(names, separator=" ").alias("text")
    return found.select(pl.lit(None, pl.Int64).alias("user_id"), "item_id", text)


def _whole(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(c).cast(pl.Int64) for c in ("user_id", "item_id") if c in frame.columns)


if __name__ == "__main__":
    main()
