"""What must hold between the tables of a data directory: ids of one kind, unique keys, known references."""

from __future__ import annotations

import polars as pl

from recjax.data.problems import Findings, rows
from recjax.data.reader import IDS, Reader


def align_ids(frames: dict[str, pl.DataFrame | None], reader: Reader, found: Findings) -> None:
    """The same id must be of one kind in every table; numbers written as text elsewhere become numbers."""
    for column in IDS:
        kinds = {name: f[column].dtype for name, f in frames.items() if f is not None and column in f.columns}
        if len(set(kinds.values())) < 2:
            continue
        for name in [n for n, dtype in kinds.items() if dtype == pl.String]:
            frame = frames[name]
            assert frame is not None
            odd = ~frame[column].str.contains(r"^(0|[1-9]\d{0,17})$")
            other = next(n for n, dtype in kinds.items() if dtype != pl.String)
            if odd.any():
                row = int(odd.arg_true()[0])
                found.error(
                    reader.file(name),
                    f"mixed types: {column} is text here ({frame[column][row]!r}) but whole numbers in {other}",
                    row=row + 1,
                    column=column,
                    expected="the same ids in every table",
                    mend="write the ids of all tables in the same way",
                )
            else:
                frames[name] = frame.with_columns(pl.col(column).cast(pl.Int64))
                found.note(f"{name}: {column} is text that holds whole numbers, read as numbers as in {other}")


def check_unique(frames: dict[str, pl.DataFrame | None], reader: Reader, found: Findings) -> None:
    """Each item, user, query and vector is described once."""
    for table, frame in frames.items():
        column = {"users": "user_id", "queries": "query_id"}.get(table, "item_id")
        if frame is None or table in ("interactions", "relevance") or column not in frame.columns:
            continue
        again = ~frame[column].is_first_distinct()
        if again.any():
            row = int(again.arg_true()[0])
            found.error(
                reader.file(table),
                f"{column} {frame[column][row]!r} occurs again ({int(again.sum()):,} rows repeat an id)",
                row=row + 1,
                column=column,
                expected=f"each {column} once",
                mend="keep one row for each id",
            )


def count_unknown(frames: dict[str, pl.DataFrame | None], reader: Reader, found: Findings) -> None:
    """Ids that another table does not describe: allowed, but counted."""
    vectors = [(table, "item_id", "items") for table in frames if table.startswith("vectors/")]
    for table, column, other in (
        ("interactions", "item_id", "items"),
        ("interactions", "user_id", "users"),
        ("interactions", "query_id", "queries"),
        ("relevance", "item_id", "items"),
        ("relevance", "query_id", "queries"),
        ("relevance", "user_id", "users"),
        *vectors,
    ):
        left, right = frames[table], frames[other]
        if left is None or right is None or not (column in left.columns and column in right.columns):
            continue
        if left[column].dtype != right[column].dtype:
            continue
        unknown = ~left[column].is_in(right[column].implode())
        if unknown.any():
            number = left[column].filter(unknown).n_unique()
            what = f"{column} that {other} does not have in {rows(int(unknown.sum()))} ({number:,} different); kept"
            found.warn(reader.file(table), what, column=column, mend=f"add them to {other}, or leave it so")
