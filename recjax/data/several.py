"""Several data directories as the domains of one log of rows: categories of a shop, countries, surfaces.

Each row gets the name of its folder as `domain`. An id of one folder means nothing in another unless its column is
said to be shared: it is written behind the name of its folder, so that vocabularies keep the folders apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError

if TYPE_CHECKING:
    from recjax.data.impression_log import ImpressionLog

DOMAIN = "domain"
IDS = ("user_id", "item_id", "query_id")


def joined(logs: Sequence[tuple[str, ImpressionLog]], shared: Sequence[str]) -> ImpressionLog:
    """One log of the rows of all (folder, log), folder after folder, with the columns that any of them has.

    Times are kept where all have them. Columns of other tables that are of another kind in another folder are left out,
    and a note says so. Raises `DataError` for folders of one name, rows that have a domain already, or ids that are
    shared and of different types.
    """
    names = [Path(path).name for path, _ in logs]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"two folders are named {twice[0]}", where=", ".join(p for p, _ in logs), expected="other names"
        )
    first = type(logs[0][1])
    notes: list[str] = []
    frames, sides, vectors = [], {}, {}
    for name, (path, log) in zip(names, logs, strict=True):
        if DOMAIN in log.rows.columns:
            raise DataError(f"the rows have a column {DOMAIN} already", where=path, expected="the folder to say it")
        frames.append(_apart(log.rows, name, shared).with_columns(pl.lit(name).alias(DOMAIN)))
        for table, frame in log.sides.items():
            sides.setdefault(table, []).append(_apart(frame, name, shared))
        for kind, (array, ids) in log.vectors.items():
            vectors.setdefault(kind, []).append((array, ids if "item_id" in shared else [f"{name}/{i}" for i in ids]))
        notes += [f"{name}: {note}" for note in log.notes]
    if not all("timestamp" in frame.columns for frame in frames):
        frames = [frame.drop("timestamp", strict=False) for frame in frames]
        notes.append("times are left out, because not all folders have them")
    return first(
        rows=_stacked(frames, "interactions", notes, must=IDS),
        sides={
            t: _stacked(f, t, notes, must=IDS).unique(_id(f[0]), keep="first", maintain_order=True)
            for t, f in sides.items()
        },
        vectors={kind: _vectors(parts, kind) for kind, parts in vectors.items()},
        simulated=any(log.simulated for _, log in logs),
        notes=tuple(notes),
        warnings=tuple(f"{name}: {w}" for name, (_, log) in zip(names, logs, strict=True) for w in log.warnings),
    )


def _apart(frame: pl.DataFrame, name: str, shared: Sequence[str]) -> pl.DataFrame:
    """Ids that are not shared with the name of the folder before them."""
    own = [column for column in IDS if column in frame.columns and column not in shared]
    return frame.with_columns((pl.lit(f"{name}/") + pl.col(c).cast(pl.String)).alias(c) for c in own)


def _id(frame: pl.DataFrame) -> str:
    return next(column for column in IDS if column in frame.columns)


def _stacked(frames: Sequence[pl.DataFrame], table: str, notes: list[str], must: Sequence[str]) -> pl.DataFrame:
    kinds: dict[str, set[str]] = {}
    for frame in frames:
        for column, dtype in frame.schema.items():
            kinds.setdefault(column, set()).add(_kind(dtype))
    odd = [column for column, found in kinds.items() if len(found - {"nothing"}) > 1]
    if wrong := [column for column in odd if column in must]:
        raise DataError(f"the ids {wrong[0]} are numbers in one folder and text in another", where=table)
    if odd:
        notes.append(f"{table}: left out, because folders differ in what they hold: {', '.join(odd)}")
    return pl.concat([frame.drop(odd, strict=False) for frame in frames], how="diagonal_relaxed")


def _kind(dtype: Any) -> str:
    if dtype == pl.Null:
        return "nothing"
    return "number" if dtype.is_numeric() or dtype == pl.Boolean else str(dtype)


def _vectors(parts: Sequence[tuple[np.ndarray, Sequence[str]]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    if len({array.shape[1] for array, _ in parts}) > 1:
        widths: Mapping[int, int] = Counter(array.shape[1] for array, _ in parts)
        raise DataError(f"vectors of the widths {sorted(widths)}", where=f"vectors/{kind}.npy", expected="one width")
    return np.concatenate([array for array, _ in parts]), np.concatenate([np.asarray(ids) for _, ids in parts])
