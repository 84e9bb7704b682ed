"""Reads a log of impressions or ratings: rows with labels, which need not have users, items or times.

The rows are `interactions.*`, or the files `train.*`, `valid.*` and `test.*` one after the other, whose names become
the column `split`. Besides Parquet, CSV and TSV they may be libsvm-like text (`.libsvm`, `.libffm`), a label and then
`index:value` or `field:index:value`, where each feature is the name of a category: `field_0`, `field_1` and so on are
the columns. What other tables and vectors there are is read as for any data directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.columns import read_times, type_text
from recjax.data.formats import SUFFIXES, find_table, read_table
from recjax.data.problems import Findings
from recjax.data.raw import Raw
from recjax.data.reader import Reader
from recjax.data.several import joined
from recjax.data.sources import DataDir, folder_of
from recjax.data.vectors import read_vectors

SPLITS = ("train", "valid", "test")
LIBSVM = (".libsvm", ".libffm")
LABEL = "label"
_WHOLE = "interactions"
_SIDES = ("items", "users", "queries")


@dataclass(frozen=True, kw_only=True)
class ImpressionLog:
    """`rows` in the order of the files; `split` among its columns where the files say it, and `timestamp` (int64
    seconds) where there is one. `sides` are the other tables, `vectors[name]` an array and its ids."""

    rows: pl.DataFrame
    sides: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    vectors: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    simulated: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_log(data: DataDir) -> ImpressionLog:
    """Read everything. Raises `DataError` for the first thing that cannot be used."""
    if not data.path:
        tables = data.simulate.tables()
        sides = {name: frame for name in _SIDES if (frame := getattr(tables, name)) is not None}
        return ImpressionLog(
            rows=tables.interactions,
            sides=sides,
            vectors=tables.vectors,
            simulated=True,
            notes=tables.notes,
            warnings=tables.warnings,
        )
    if len(data.folders) > 1:
        return joined([(path, read_log(replace(data, path=path))) for path in data.folders], data.shared)
    folder = folder_of(data.path)
    if not folder.is_dir():
        raise DataError("there is no such data directory", where=str(folder), expected="a folder")
    found = Findings()
    reader = Reader(folder, dict(data.columns), found)
    rows = _read_rows(folder, reader, found)
    sides = {name: frame for name in _SIDES if (frame := reader.table(name)) is not None}
    reader.check_mapping()
    arrays, ids = read_vectors(reader, found)
    found.raise_first()
    warnings = tuple(f"{p.where}: {p.what}" for p in found.problems)
    return ImpressionLog(
        rows=rows,
        sides=sides,
        vectors={name: (array, _ids(ids[f"vectors/{name}_ids"])) for name, array in arrays.items()},
        notes=tuple(found.notes),
        warnings=warnings,
    )


def holds_rows(path: str) -> bool:
    """Whether a data directory holds rows that are no interactions: those of splits, or libsvm-like text."""
    folder = folder_of(path)

    def has(name: str, suffixes: Iterable[str]) -> bool:
        return any((folder / (name + suffix)).exists() for suffix in suffixes)

    return not has(_WHOLE, SUFFIXES) and (has(_WHOLE, LIBSVM) or has("train", (*SUFFIXES, *LIBSVM)))


def describe_rows(log: ImpressionLog) -> list[str]:
    """Lines about the rows: how many there are of each split, and what each column holds."""
    rows = log.rows
    lines = [f"log: {rows.height:,} rows"]
    if "split" in rows.columns:
        sizes = rows.group_by("split", maintain_order=True).len()
        lines.append("splits: " + ", ".join(f"{name} {count:,}" for name, count in sizes.iter_rows()))
    for name in (n for n in rows.columns if n != "split"):
        values = rows[name]
        kind = "lists" if isinstance(values.dtype, pl.List | pl.Array) else f"{values.n_unique():,} values"
        mean = f", mean {values.mean():.4g}" if values.dtype.is_numeric() and not name.endswith("_id") else ""
        gone = f", missing in {values.null_count() / max(rows.height, 1):.1%}" if values.null_count() else ""
        lines.append(f"column {name}: {kind}{mean}{gone}")
    return lines


def raw_of(values: pl.Series) -> Raw:
    """A column as `Raw`; dates and times are seconds since 1970."""
    if isinstance(values.dtype, pl.List | pl.Array):
        inner = values.cast(pl.List(values.dtype.inner)).list.drop_nulls()  # type: ignore[attr-defined]
        lengths = inner.list.len().fill_null(0).to_numpy().astype(np.int64)
        flat = raw_of(inner.explode(empty_as_null=False, keep_nulls=False))
        owner = np.repeat(np.arange(len(values)), lengths)[~flat.missing]
        offsets = np.concatenate([np.zeros(1, np.int64), np.bincount(owner, minlength=len(values)).cumsum()])
        return Raw(flat.values[~flat.missing], values.is_null().to_numpy(), offsets)
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if values.dtype in (pl.Date, pl.Datetime):
        values = values.cast(pl.Datetime("us")).dt.epoch("s")
    if values.dtype == pl.Null:
        return Raw.constant(None, len(values))
    if values.dtype == pl.String:
        missing = (values.is_null() | (values.str.strip_chars() == "")).fill_null(True)
        return Raw(values.fill_null("").to_numpy().astype(object), missing.to_numpy())
    if values.dtype.is_integer() or values.dtype == pl.Boolean:
        return Raw(values.cast(pl.Int64).fill_null(0).to_numpy(), values.is_null().to_numpy())
    if values.dtype.is_float():
        numbers = values.cast(pl.Float64).fill_null(np.nan).to_numpy()
        return Raw(np.nan_to_num(numbers, nan=0.0), np.isnan(numbers))
    raise DataError(
        f"the column {values.name} of type {values.dtype} cannot be used", expected="numbers, text or lists"
    )


def _read_rows(folder: Path, reader: Reader, found: Findings) -> pl.DataFrame:
    """The rows of all files; raises `DataError` at once, because nothing can be said without them."""
    whole = _read_part(folder, _WHOLE, reader, found)
    parts = [(name, _read_part(folder, name, reader, found)) for name in SPLITS] if whole is None else []
    found.raise_first()
    if whole is not None:
        return _timed(whole, folder, found)
    named = [frame.with_columns(split=pl.lit(name)) for name, frame in parts if frame is not None]
    if not any(name == "train" and frame is not None for name, frame in parts):
        kinds = ", ".join((*SUFFIXES, *LIBSVM))
        raise DataError(
            "there are no rows to learn from",
            where=str(folder),
            expected=f"interactions, or train, valid and test, with one of the endings {kinds}",
        )
    for frame in named[1:]:
        if set(frame.columns) != set(named[0].columns):
            odd = ", ".join(sorted(set(frame.columns) ^ set(named[0].columns)))
            raise DataError(f"the files of the splits differ in their columns: {odd}", where=str(folder))
    return _timed(pl.concat(named, how="diagonal_relaxed"), folder, found)


def _read_part(folder: Path, name: str, reader: Reader, found: Findings) -> pl.DataFrame | None:
    path = find_table(folder, name, found)
    if path is None:
        text = next((p for p in (folder / (name + suffix) for suffix in LIBSVM) if p.exists()), None)
        return None if text is None else read_libsvm(text)
    frame = read_table(path, found)
    if frame is None:
        return None
    names = {source: key for key, source in reader.columns.items() if "." not in key and source in frame.columns}
    reader.seen[name] = frame.columns
    reader.used |= set(names.values())
    frame = frame.drop([n for n in names.values() if n in frame.columns and n not in names]).rename(names)
    if path.suffix != ".parquet":
        frame = frame.with_columns(type_text(frame[c]) for c in frame.columns if c != "timestamp")
    found.note(f"{path.name}: {frame.height:,} rows; {', '.join(frame.columns)}")
    return frame


def read_libsvm(path: Path) -> pl.DataFrame:
    """`label` and one column of categories for each place in a line, or for each field where fields are named.

    Raises `DataError` for a line that is not so, or a value other than 1: these files name categories.
    """
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    columns: dict[str, list[str | None]] = {}
    labels = np.empty(len(lines))
    for row, (label, *pairs) in enumerate(lines):
        try:
            labels[row] = float(label)
            for place, pair in enumerate(pairs):
                *first, index, value = pair.split(":")
                if float(value) != 1 or len(first) > 1:
                    raise ValueError(f"{pair} is not a category")
                values = columns.setdefault(f"field_{first[0] if first else place}", [None] * len(lines))
                values[row] = index
        except ValueError as error:
            raise DataError(
                f"cannot read this line: {error}",
                where=f"{path}, row {row + 1}",
                expected="LABEL INDEX:1 INDEX:1 ... or LABEL FIELD:INDEX:1 ...",
            ) from None
    order = sorted(columns, key=lambda name: (len(name), name))
    return pl.DataFrame({LABEL: labels, **{name: type_text(pl.Series(name, columns[name])) for name in order}})


def _timed(frame: pl.DataFrame, folder: Path, found: Findings) -> pl.DataFrame:
    """The rows with their timestamp, if any, in seconds."""
    if "timestamp" not in frame.columns:
        return frame
    read = read_times(frame["timestamp"], found, str(folder), from_text=frame["timestamp"].dtype == pl.String)
    found.raise_first()
    if read is None:
        return frame.drop("timestamp")
    return frame.with_columns((read[0] // read[1]).alias("timestamp"))


def _ids(frame: pl.DataFrame | None) -> np.ndarray:
    return np.empty(0) if frame is None else frame["item_id"].to_numpy()
