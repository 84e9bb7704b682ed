"""What is said of an item or a user: typed fields of a table as one line of text.

A field that the table lacks is a mistake of the configuration, unless it is optional; a value that one item lacks is
left out. Values of a wrong type are refused, not guessed at. polars is used through the frames that are passed in, so
that a recipe with these settings can be read where it is not installed.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recjax.core.errors import ConfigError, DataError

KINDS = ("text", "number", "list", "date")


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field `name`, read from the first of `columns` that the table has (the column `name` when none are given).

    `kind` is "text", "number", "list" (a list column, or text cut at `separator`) or "date" (seconds since 1970, or a
    date). `label` stands before the value, the name by default; "" for nothing. Of a list the first `most` values are
    taken. A text of more than `limit` characters is cut after a word.
    """

    name: str
    columns: tuple[str, ...] = ()
    kind: str = "text"
    label: str | None = None
    required: bool = True
    separator: str = "|"
    most: int = 4
    limit: int = 160

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns) or (self.name,))
        if self.kind not in KINDS:
            raise ConfigError(f"Field.kind = {self.kind!r}", where=self.name, expected=" or ".join(map(repr, KINDS)))
        if self.most < 1 or self.limit < 1 or not self.separator:
            raise ConfigError(
                f"Field.most = {self.most}, limit = {self.limit}, separator = {self.separator!r}",
                where=self.name,
                expected="numbers of at least 1, and a separator",
            )

    def column(self, present: Sequence[str], table: str) -> str | None:
        """The column that the field is read from; None where there is none and none is needed.

        Raises `DataError` when a required one is missing.
        """
        found = next((name for name in self.columns if name in present), None)
        if found is None and self.required:
            raise DataError(
                f"the field {self.name!r} of a prompt has no column",
                where=table,
                expected=f"{' or '.join(self.columns)}; there are {', '.join(present) or 'none'}",
                mend="bring the column, map it in DataDir.columns, or take the field out",
            )
        return found

    def said(self, value: Any) -> str:
        """A value in words, "" where there is none. Raises `TypeError` when it is of another kind."""
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return ""
        if self.kind == "number":
            return f"{_number(value):g}"
        if self.kind == "date":
            return _date(value).isoformat()
        if self.kind == "list":
            return ", ".join(self.values(value)[: self.most])
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no text")
        return shortened(value, self.limit)

    def lists(self, frame: Any, table: str) -> list[list[str]]:
        """What the field holds in each row of a polars frame as a list, whatever its kind; empty ones without a column.

        Raises `DataError` as `Entity.parts` does.
        """
        column = self.column(frame.columns, table)
        if column is None:
            return [[] for _ in range(frame.height)]
        try:
            return [self.values(value) for value in frame.get_column(column).to_list()]
        except TypeError as error:
            raise DataError(
                f"the field {self.name!r} of a prompt: {error}", where=f"{table}, column {column}", expected="lists"
            ) from None

    def values(self, value: Any) -> list[str]:
        """What a list holds, without blanks. Raises `TypeError` for what is none."""
        if value is None:
            return []
        if isinstance(value, str):
            value = value.split(self.separator)
        if not isinstance(value, list | tuple):
            raise TypeError(f"{value!r} is no list")
        return [" ".join(str(v).split()) for v in value if v is not None and str(v).strip()]


TITLE = Field(name="title", columns=("title", "name", "item_title", "product_title", "headline"), label="")
GENRES = Field(name="genres", columns=("genres", "genre", "categories", "category"), kind="list", required=False)


@dataclass(frozen=True, kw_only=True)
class Entity:
    """What is said of each row of a table: its fields in order, with "; " between them."""

    fields: Sequence[Field] = (TITLE, GENRES)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise ConfigError(f"fields named {', '.join(names)}", where="Entity.fields", expected="different names")

    def parts(self, frame: Any, table: str) -> list[list[str]]:
        """For each row of a polars frame the fields that it has a value for, in words.

        Raises `DataError` when a required column is missing, or a value is of another kind.
        """
        found: list[list[str]] = [[] for _ in range(frame.height)]
        for field in self.fields:
            column = field.column(frame.columns, table)
            if column is None:
                continue
            label = field.name if field.label is None else field.label
            before = f"{label}: " if label else ""
            for row, value in enumerate(frame.get_column(column).to_list()):
                try:
                    said = field.said(value)
                except (TypeError, ValueError) as error:
                    raise DataError(
                        f"the field {field.name!r} of a prompt: {error}",
                        where=f"{table}, column {column}, row {row + 1}",
                        expected=f"a {field.kind}",
                        mend=f"set Field.kind to what the column holds: {', '.join(KINDS)}",
                    ) from None
                if said:
                    found[row].append(before + said)
        return found

    def texts(self, frame: Any, table: str, ids: str) -> list[str]:
        """One line for each row; a row without any value is called by its id, of the column `ids`."""
        every = zip(self.parts(frame, table), frame.get_column(ids).to_list(), strict=True)
        return ["; ".join(parts) or f"{table.removesuffix('s')} {row_id}" for parts, row_id in every]


def shortened(text: str, limit: int) -> str:
    """A text with single spaces, cut after the last word that fits `limit` characters."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    cut = text[: limit + 1].rpartition(" ")[0] or text[:limit]
    return cut.rstrip(" ,;:.") + "..."


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _date(value: Any) -> datetime.date:
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    return datetime.datetime.fromtimestamp(_number(value), datetime.UTC).date()
