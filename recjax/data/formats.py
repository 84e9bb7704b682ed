"""Reads one table file of a data directory: Parquet, CSV or TSV, the text forms also gzipped.

Text files come back with every column as text and are typed later, because only the reader of a column knows whether
"007" is a number. A file that cannot be read gives a problem that says why (empty, another type than its name says,
ragged line, not UTF-8), never a traceback. This file does not look at column names.
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import polars as pl

from recjax.data.problems import Findings, nearest

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")


def find_table(folder: Path, name: str, found: Findings, *, required: bool = False) -> Path | None:
    """The file that holds table `name`, or None; two files for one table are an error."""
    paths = [p for p in (folder / (name + suffix) for suffix in SUFFIXES) if p.exists()]
    if len(paths) > 1:
        names = ", ".join(p.name for p in paths)
        found.error(
            str(folder),
            f"{len(paths)} files claim to be the {name} table: {names}",
            expected="one file a table",
            mend="move the files that are not meant out of the folder",
        )
        return None
    if not paths and required:
        present = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        close = nearest(name, [p.split(".")[0] for p in present])
        has = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "") if present else "nothing"
        found.error(
            str(folder),
            f"there is no {name} file; the folder holds {has}",
            expected=f"{name}.parquet or {name}.csv (.csv.gz, .tsv, .tsv.gz)",
            mend=f"is it {close}.*? rename it" if close else f"save the {name} table under that name",
        )
    return paths[0] if paths else None


def read_table(path: Path, found: Findings) -> pl.DataFrame | None:
    """The file as a frame (text files: every column String, empty cells null), or None after adding an error."""
    file, count = str(path), len(found.errors)
    if path.is_dir():
        found.error(file, "is a folder", expected="one file", mend="write the parts into one file")
        return None
    if path.stat().st_size == 0:
        found.error(file, "the file is empty (0 bytes)", expected="a table", mend="write the file again")
        return None
    try:
        frame = _read_parquet(path, found) if path.suffix == ".parquet" else _read_text(path, found)
    except OSError as e:
        found.error(file, f"cannot be read: {e.strerror or e}", mend="check the rights and the disk")
        return None
    if frame is None or len(found.errors) > count:
        return None
    if frame.width == 0 or frame.height == 0:
        found.error(file, "the table has no rows", expected="at least one row", mend="write the file again")
        return None
    return frame


def _read_parquet(path: Path, found: Findings) -> pl.DataFrame | None:
    with path.open("rb") as f:
        head = f.read(4)
        f.seek(max(0, path.stat().st_size - 4))
        tail = f.read(4)
    if head != b"PAR1":
        found.error(
            str(path),
            f"is named .parquet but is {_kind(head)}",
            expected="a Parquet file",
            mend="rename it to what it is (.csv, .tsv, .csv.gz) or write it as Parquet",
        )
        return None
    try:
        if tail != b"PAR1":
            raise pl.exceptions.ComputeError("its end is missing, as after a broken copy")
        return pl.read_parquet(path, hive_partitioning=False)
    except (pl.exceptions.PolarsError, ValueError) as e:
        found.error(str(path), f"is a damaged Parquet file: {_first_line(e)}", mend="copy or write the file again")
        return None


def _read_text(path: Path, found: Findings) -> pl.DataFrame | None:
    file, separator = str(path), "\t" if ".tsv" in path.name else ","
    with path.open("rb") as f:
        head = f.read(4)
    zipped = head[:2] == b"\x1f\x8b"
    if zipped != (path.suffix == ".gz") or _kind(head) not in ("gzip", "text"):
        found.error(
            file,
            f"is named {path.name} but is {_kind(head)}",
            expected="gzipped text" if path.suffix == ".gz" else "plain text",
            mend="rename it to what it is (.parquet, .csv, .csv.gz, .tsv, .tsv.gz)",
        )
        return None
    try:
        content = gzip.decompress(path.read_bytes()) if zipped else path
        frame = pl.read_csv(content, separator=separator, infer_schema=False)
    except pl.exceptions.NoDataError:
        found.error(file, "the table has no rows", expected="a header and at least one row", mend="write it again")
        return None
    except (EOFError, gzip.BadGzipFile, OSError) as e:
        found.error(file, f"is a damaged gzip file: {_first_line(e)}", mend="copy or write the file again")
        return None
    except (pl.exceptions.PolarsError, ValueError) as e:
        _explain_text(path, separator, zipped, e, found)
        return None
    return frame.rename({c: c.strip().removeprefix("\ufeff") for c in frame.columns})


def _explain_text(path: Path, separator: str, zipped: bool, cause: Exception, found: Findings) -> None:
    """Read the file again, slowly, to say which row broke the fast reader."""
    file = str(path)
    raw = gzip.open(path, "rb") if zipped else path.open("rb")
    row, width = 0, 0
    with raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        try:
            for row, cells in enumerate(csv.reader(text, delimiter=separator, strict=True)):
                if row == 0:
                    width = len(cells)
                elif len(cells) > width:
                    found.error(
                        file,
                        f"the row has {len(cells)} cells",
                        row=row,
                        expected=f"{width} cells, as in the header",
                        mend='put text that holds the separator or line breaks in double quotes ("...")',
                    )
                    return
        except UnicodeDecodeError:
            mend = "save the file as UTF-8, for example: iconv -f LATIN1 -t UTF-8"
            found.error(
                file, "the text is not UTF-8", row=_first_undecodable(path, zipped), expected="UTF-8", mend=mend
            )
            return
        except csv.Error as e:
            mend = 'close every double quote and double those inside a text ("")'
            found.error(file, f"the row cannot be read: {e}", row=row + 1, mend=mend)
            return
    found.error(file, f"cannot be read: {_first_line(cause)}", mend="write the file again, or as Parquet")


def _first_undecodable(path: Path, zipped: bool) -> int:
    with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _kind(head: bytes) -> str:
    if head == b"PAR1":
        return "Parquet"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head == b"PK\x03\x04":
        return "a zip archive or spreadsheet"
    binary = any(b < 32 and b not in (9, 10, 13) for b in head)
    return "binary data" if binary else "text"


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
