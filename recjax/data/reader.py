"""Reads the tables of one data directory and gives each column its meaning.

One `Reader` per directory: it remembers which files and columns it met, so that a column mapping which met nothing
can be reported. It looks at one table at a time; what holds between tables is in `relations.py`.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recjax.data.columns import read_ids, read_position, read_present, read_times, type_text
from recjax.data.formats import find_table, read_table
from recjax.data.problems import Findings, nearest

TABLES = ("interactions", "items", "users", "queries", "relevance")
NEEDED = {
    "interactions": ("user_id", "item_id"),
    "items": ("item_id",),
    "users": ("user_id",),
    "queries": ("query_id", "text"),
    "relevance": ("query_id", "item_id", "label"),
}
IDS = ("user_id", "item_id", "query_id")
KNOWN = (*IDS, "timestamp", "position", "text", "label", "title", "event", "value", "rating", "domain", "query")
_NEVER_MISSING = {"queries": ("text",), "relevance": ("label",)}
_TEXT = ("text", "title", "name", "query", "description")  # stays text in text files, even "1984"
_OTHER_NAMES = {
    "user_id": ("user", "uid", "customer", "reviewer", "visitor", "session"),
    "item_id": ("item", "movie", "product", "asin", "article", "track", "book", "iid", "business"),
    "query_id": ("qid", "query"),
    "text": ("query", "title"),
    "timestamp": ("time", "date", "ts"),
    "position": ("order", "rank", "index", "step"),
    "label": ("relevance", "grade", "gain", "score"),
}


class Reader:
    """Reads the tables of one folder and remembers which files and columns it saw."""

    def __init__(self, folder: Path, columns: dict[str, str], found: Findings) -> None:
        self.folder, self.columns, self.found = folder, columns, found
        self.paths: dict[str, Path] = {}
        self.seen: dict[str, list[str]] = {}
        self.used: set[str] = set()
        self.ticks = 1

    def file(self, table: str) -> str:
        return str(self.paths.get(table, self.folder / table))

    def table(self, name: str) -> pl.DataFrame | None:
        path = find_table(self.folder, name, self.found, required=name == "interactions")
        if path is None:
            return None
        self.paths[name] = path
        frame = read_table(path, self.found)
        if frame is None:
            return None
        self.seen[name] = frame.columns
        return self.understand(name, frame, from_text=path.suffix != ".parquet")

    def understand(self, name: str, frame: pl.DataFrame, *, from_text: bool) -> pl.DataFrame | None:
        """The columns of a table under their names here and in the one form the rest of recjax knows."""
        return self._give_meaning(name, self._rename(name, frame), from_text=from_text)

    def _rename(self, table: str, frame: pl.DataFrame) -> pl.DataFrame:
        names = {}
        for key, source in self.columns.items():
            where, _, name = key.rpartition(".")
            if where in ("", table) and source in frame.columns:
                self.used.add(key)
                names[source] = name
        displaced = [n for source, n in names.items() if n != source and n in frame.columns and n not in names]
        if displaced:
            self.found.note(f"{table}: column {', '.join(displaced)} set aside, because another is mapped to its name")
        if table == "interactions" and "order" in frame.columns and "order" not in names:
            displaced.append("order")
            self.found.note(
                "interactions: column order set aside: events are numbered here; map it to position to use it"
            )
        return frame.drop(displaced).rename(names)

    def check_mapping(self) -> None:
        """A mapping that met no column is a mistake, as is one written the wrong way round."""
        everywhere = sorted({c for seen in self.seen.values() for c in seen})
        for key, source in self.columns.items():
            if key in self.used or not self.seen:
                continue
            close = nearest(source, everywhere)
            turned = source in KNOWN and key.rpartition(".")[2] in everywhere
            mend = f'write {{"{source}": "{key}"}}: recjax name first' if turned else ""
            mend = mend or (f'did you mean "{close}"?' if close else "correct or drop this mapping")
            what = f'no table has the column "{source}" that is mapped to "{key}"'
            self.found.error(str(self.folder), what, expected=f"one of {', '.join(everywhere[:12])}", mend=mend)

    def _give_meaning(self, table: str, frame: pl.DataFrame, *, from_text: bool) -> pl.DataFrame | None:
        file, found, count = self.file(table), self.found, len(self.found.errors)
        meanings = []
        for name in NEEDED[table]:
            if name not in frame.columns:
                self._missing(table, name, frame.columns)
        if table == "interactions" and not {"timestamp", "position"} & set(frame.columns):
            self._no_time(frame.columns)
        times = "timestamp" if table == "interactions" else None
        for name in frame.columns:
            values = frame[name]
            if name in IDS:
                optional = name not in NEEDED[table]
                ids = read_ids(values, found, file, from_text=from_text, optional=optional)
                if ids is not None:
                    frame = frame.with_columns(ids[0].alias(name))
                    meanings.append(f"{name} = {ids[1]}")
            elif name == times:
                read = read_times(values, found, file, from_text=from_text)
                if read is not None:
                    frame, self.ticks = frame.with_columns(read[0].alias(name)), read[1]
                    meanings.append(f"{name} = {read[2]}")
            elif name == "position" and table == "interactions":
                positions = read_position(values, found, file, from_text=from_text)
                if positions is not None:
                    frame = frame.with_columns(positions.alias(name))
                    after = ", after timestamp" if "timestamp" in frame.columns else ""
                    meanings.append(f"position = order within the user{after}")
            else:
                if name in _NEVER_MISSING.get(table, ()):
                    read_present(values, found, file)
                if from_text and name not in _TEXT:
                    frame = frame.with_columns(type_text(values))
                meanings.append(f"{name} = {_plain_type(frame[name])}")
        found.note(f"{Path(file).name}: {frame.height:,} rows; " + "; ".join(meanings))
        return frame if len(found.errors) == count else None

    def _missing(self, table: str, name: str, present: list[str]) -> None:
        mapped = self.columns.get(f"{table}.{name}") or self.columns.get(name)
        free = [c for c in present if c not in NEEDED[table]]
        close = nearest(mapped or name, free) or _guess(name, free)
        says = f' (mapped to "{mapped}")' if mapped else ""
        mend = f'if it is called "{close}": columns={{"{name}": "{close}"}}' if close else "add it, or map its name"
        taken = [key for key, source in self.columns.items() if source == name]
        if taken:
            mend = f'the mapping {{"{taken[0]}": "{name}"}} takes it away; the recjax name comes first in a mapping'
        if len(present) == 1 and any(s in present[0] for s in ";|\t"):
            mend = "the header was read as one column: separate the columns with commas (.csv) or tabs (.tsv)"
        expected = f"among the columns {', '.join(present[:12])}{', ...' if len(present) > 12 else ''}"
        self.found.error(
            self.file(table), f"there is no column {name}{says}", column=name, expected=expected, mend=mend
        )

    def _no_time(self, present: list[str]) -> None:
        close = _guess("timestamp", present)
        mend = f'if it is called "{close}": columns={{"timestamp": "{close}"}}; or ' if close else ""
        self.found.error(
            self.file("interactions"),
            "there is neither a timestamp nor a position column, so the order of events is unknown",
            column="timestamp",
            expected="timestamp or position",
            mend=mend
            + "add a position that numbers each user's events (the row number will do if the file is in order)",
        )


def _guess(name: str, present: list[str]) -> str | None:
    plain = {c.lower(): c for c in present}
    return next((c for part in _OTHER_NAMES.get(name, ()) for low, c in plain.items() if part in low), None)


def _plain_type(values: pl.Series) -> str:
    if values.dtype.is_numeric():
        return "numbers"
    names = {pl.String: "text", pl.Categorical: "text", pl.List: "lists"}
    return names.get(values.dtype.base_type(), str(values.dtype))
