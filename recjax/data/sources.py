"""The data directory a user brings: interactions, and optionally items, users, queries, relevance and vectors.

`DataDir` names the folder and maps its column names; `load` reads it into `Tables` or raises one `DataError` that
says what is wrong, where, and how to mend it. `read_tables` does the work for both `load` and `check`: it never
stops at the first problem. What it refuses to do: drop rows, repair values, or merge duplicates. Odd but usable
things (repeated rows, interactions with items that the catalogue lacks) are kept and counted.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.core.remote import here, is_url
from recjax.data.blocks import blocks
from recjax.data.directory import SIMULATED
from recjax.data.history import coded, run_lengths
from recjax.data.problems import Findings
from recjax.data.reader import TABLES, Reader
from recjax.data.relations import align_ids, check_unique, count_unknown
from recjax.data.simulate import World
from recjax.data.small_world import SmallWorld
from recjax.data.tables import TIE_RULE, Tables
from recjax.data.vectors import read_vectors

ROW = "__row"  # the number of a row in the file
_KEYS = ("timestamp", "position")

__all__ = ["TIE_RULE", "DataDir", "Tables", "World", "read_tables"]


@dataclass(frozen=True, kw_only=True)
class DataDir:
    """A folder of tables, or the simulated world (or one of `worlds.py`) when `path` is empty.

    `columns` maps a recjax name to the name in the files, {"item_id": "movieId"}; it holds for every table that has
    such a column. {"items.title": "name"} holds for one table only.

    Several folders, with a comma between them, are the domains of one log of rows (`data/several.py`); the ids in the
    columns `shared`, such as "user_id", mean the same in all of them.
    """

    path: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    simulate: World | SmallWorld = field(default_factory=World)
    shared: Sequence[str] = ()

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of `path`."""
        return tuple(filter(None, (part.strip() for part in self.path.split(","))))

    def load(self) -> Tables:
        """Read everything. Raises `DataError` for the first thing that cannot be used."""
        if not self.path:
            return self.simulate.tables()
        if len(self.folders) > 1:
            raise DataError("several folders", where=self.path, expected="one, or a task of rows with labels")
        found = Findings()
        tables = read_tables(self.path, self.columns, found)
        found.raise_first()
        assert tables is not None
        return tables


def folder_of(path: str) -> Path:
    """The folder of a data directory: of a URL (`s3://`, `gs://`), a copy on this machine of what lies there now.

    Raises `DataError` when a URL cannot be read.
    """
    return here(path, error=DataError) if is_url(path) else Path(path).expanduser()


def read_tables(
    path: str, columns: Mapping[str, str], found: Findings, *, despite_errors: bool = False
) -> Tables | None:
    """Read a data directory, adding every problem and note to `found`; None when there are errors.

    `despite_errors` gives what could be read in spite of them, for reports; never train on it.
    """
    folder = folder_of(path)
    if not folder.is_dir():
        what = "the data directory is a file, not a folder" if folder.exists() else "there is no such data directory"
        mend = "give the folder that holds interactions.parquet (or .csv)"
        found.error(str(folder), what, expected="a folder", mend=mend)
        return None
    reader = Reader(folder, dict(columns), found)
    frames = {name: reader.table(name) for name in TABLES}
    reader.check_mapping()
    arrays, ids = read_vectors(reader, found)
    frames |= ids
    align_ids(frames, reader, found)
    if frames["interactions"] is not None:
        frames["interactions"] = _sort(frames["interactions"], reader, found)
    check_unique(frames, reader, found)
    count_unknown(frames, reader, found)
    if frames["interactions"] is None or (found.errors and not despite_errors):
        return None
    warnings = tuple(f"{p.where}: {p.what}" for p in found.problems)
    rest = {name: frames[name] for name in TABLES[1:]}
    return Tables(
        interactions=frames["interactions"],
        **rest,
        vectors={name: (array, _numpy(frames[f"vectors/{name}_ids"])) for name, array in arrays.items()},
        simulated=(folder / SIMULATED).exists(),
        notes=tuple(found.notes),
        warnings=warnings,
    )


def in_order(interactions: pl.DataFrame, ticks: int) -> pl.DataFrame:
    """Rows in the order of the file, sorted by user, time and position; with `order`, and times in seconds.

    The columns are taken out of `interactions`.
    """
    order = _order(interactions, ["user_id", *(c for c in _KEYS if c in interactions.columns)])
    return _numbered(_gathered(interactions, order), ticks)


def _numbered(frame: pl.DataFrame, ticks: int) -> pl.DataFrame:
    if "timestamp" in frame.columns and ticks > 1:
        frame = frame.with_columns(pl.col("timestamp").floordiv(ticks))
    lengths = run_lengths(frame.get_column("user_id"))
    order = np.ones(frame.height, np.int64)  # what each number is above the one before it
    order[:1] = 0
    order[np.cumsum(lengths[:-1])] = 1 - lengths[:-1]
    return frame.with_columns(order=pl.Series(np.cumsum(order, out=order), dtype=pl.Int64))


def _gathered(frame: pl.DataFrame, order: pl.Series) -> pl.DataFrame:
    """The rows in an order by user, taken out of `frame` column by column, so that two logs are never in memory."""

    def gathered(values: pl.Series) -> pl.Series:
        if values.name == "user_id" and values.dtype.is_integer():  # sorting is faster than gathering
            return pl.Series(values.name, np.sort(values.to_numpy()))
        return values.rechunk().gather(order)

    return pl.DataFrame([gathered(frame.drop_in_place(name)) for name in frame.columns])


def _order(frame: pl.DataFrame, columns: list[str]) -> pl.Series:
    """The numbers of the rows by these columns, then by their place in the file.

    Where there is room, one number is made of all of them and sorted, which is several times as fast.
    """
    if len(columns) == 2 and frame[columns[1]].is_sorted():
        columns = columns[:1]
    parts, room = [], 1
    for column in columns:
        values = frame[column]
        numbers = coded(values)[1] if values.dtype == pl.String else values.to_numpy()
        low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
        parts.append((numbers, low, high - low + 1))
        room *= high - low + 1
    if room >= 2**63:
        return frame.select(pl.arg_sort_by(columns, maintain_order=True)).to_series()
    bits = frame.height.bit_length()
    is_roomy = room << bits < 2**63
    key, order = np.empty(frame.height, np.int64), np.empty(frame.height, np.uint32)
    for at in blocks(len(key)):
        key[at] = 0
        for numbers, low, size in parts:
            key[at] = key[at] * size + (numbers[at] - low)
        if is_roomy:
            key[at] = (key[at] << bits) | np.arange(at.start, at.stop)
    if not is_roomy:
        return pl.Series(np.argsort(key, kind="stable").astype(np.uint32))
    key.sort()
    for at in blocks(len(key)):
        order[at] = key[at] & ((1 << bits) - 1)
    return pl.Series(order)


def _sort(frame: pl.DataFrame, reader: Reader, found: Findings) -> pl.DataFrame:
    """The log in order, taken out of `frame`; notes how many events are tied, and warns of repeated ones."""
    keys = [c for c in _KEYS if c in frame.columns]
    file, n = reader.file("interactions"), frame.height
    order = _order(frame, ["user_id", *keys])
    fine = _gathered(frame, order)
    columns = [fine.get_column(key) for key in ("user_id", *keys[:1])]
    same = [(column.slice(1) == column.head(n - 1)).fill_null(False) for column in columns]
    before, nowhere = functools.reduce(operator.and_, same), pl.Series([False])
    is_tied = pl.concat([nowhere, before]) | pl.concat([before, nowhere])
    tied = fine.filter(is_tied).with_columns(order.filter(is_tied).alias(ROW))
    _count_repeats(tied.sort(ROW), n, keys, file, found)
    if keys:
        rule = "".join(f"{k}, then " for k in keys[1:]) + TIE_RULE
        share = f"{tied.height:,} of {n:,} events ({tied.height / n:.1%})"
        found.note(
            f"order of events: by {keys[0]}, which {share} share with another event of the same user; ties by {rule}"
        )
    return _numbered(fine, reader.ticks)


def _count_repeats(tied: pl.DataFrame, n: int, keys: list[str], file: str, found: Findings) -> None:
    """Note exact repeats, which are among the events that are tied."""
    same = [c for c in ("user_id", "item_id", *keys, "event", "query", "query_id") if c in tied.columns]
    repeats = tied.filter(~pl.struct(same).is_first_distinct())
    if repeats.height:
        found.warn(
            file,
            f"{repeats.height:,} of {n:,} events repeat an earlier one exactly; they are kept",
            row=int(repeats[ROW][0]) + 1,
            mend="nothing to do if they are real; else write each event once",
        )


def _numpy(frame: pl.DataFrame | None) -> np.ndarray:
    return np.empty(0) if frame is None else frame["item_id"].to_numpy()
