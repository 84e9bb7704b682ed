"""Raw columns: values as they come from a table or from a request, before a field makes anything of them.

The same value must look the same whether it was read from Parquet, from CSV or from the JSON of a request. So a column
here is whole numbers (int64), numbers (float64) or text, never a mixture, and has a mark where a value is missing:
null, not a number, or blank text. As a key every value is text, and a whole number is written without decimals, so that
7, 7.0 and "7" are one value. Numpy only, because servers load this file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recjax.core.errors import DataError
from recjax.data.record import spans

_EXACT = 2.0**53
_LISTS = (list, tuple, np.ndarray)


@dataclass(frozen=True)
class Raw:
    """One column of n rows.

    `values` are int64, float64 or an object array of str; what stands where `missing` (bool [n]) is meaningless. With
    `offsets` (int64 [n + 1]) row i is the list `values[offsets[i]:offsets[i + 1]]`, empty where the list is missing.
    """

    values: np.ndarray
    missing: np.ndarray
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.missing)

    @classmethod
    def of(cls, values: Sequence[Any]) -> Raw:
        """A column of Python values as JSON has them: None, numbers, text, or lists of these, in which None is left
        out. Raises `DataError` for values of other types."""
        if any(isinstance(v, _LISTS) for v in values):
            lists = [[] if v is None else list(v) if isinstance(v, _LISTS) else [v] for v in values]
            lists = [[v for v in row if not _is_missing(v)] for row in lists]
            lengths = np.array([len(row) for row in lists], np.int64)
            flat = cls.of([v for row in lists for v in row])
            missing = np.array([v is None for v in values], bool)
            return cls(flat.values, missing, np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))
        missing = np.array([_is_missing(v) for v in values], bool)
        known = [v for v, gone in zip(values, missing.tolist(), strict=True) if not gone]
        if odd := next((v for v in known if not isinstance(v, str | int | float | np.number | np.bool_)), None):
            raise DataError(f"a value of type {type(odd).__name__}", expected="a number, a text, or a list of these")
        if any(isinstance(v, str) for v in known):
            kind, known = object, [v if isinstance(v, str) else text_of(v) for v in known]
        else:
            kind = np.int64 if all(_is_whole(v) for v in known) else np.float64
        found = np.full(len(values), "" if kind is object else 0, kind)
        found[~missing] = np.array(known, kind)
        return cls(found, missing)

    @classmethod
    def constant(cls, value: Any, count: int) -> Raw:
        """`count` times the same value."""
        return cls.of([value]).take(np.zeros(count, np.int64))

    @functools.cached_property
    def keys(self) -> tuple[np.ndarray, list[str]]:
        """int64 for each entry of `values`: which of the texts that follow it is; those of missing rows count too."""
        if self.values.dtype == object:
            index: dict[str, int] = {}
            codes = np.fromiter((index.setdefault(t, len(index)) for t in self.values), np.int64, len(self.values))
            return codes, list(index)
        unique, codes = np.unique(self.values, return_inverse=True)
        return codes.astype(np.int64), [text_of(v) for v in unique.tolist()]

    def numbers(self, where: str) -> np.ndarray:
        """float64 [n], 0 where missing. Raises `DataError` for a list or a text that is no number."""
        if self.offsets is not None:
            raise DataError("lists cannot be read as numbers", where=where, expected="one number in each row")
        if self.values.dtype != object:
            return np.where(self.missing, 0.0, self.values.astype(np.float64))
        try:
            return np.array([0.0 if m else float(t) for t, m in zip(self.values, self.missing, strict=True)])
        except ValueError as error:
            raise DataError(f"a text is not a number: {error}", where=where, expected="numbers") from None

    def take(self, rows: np.ndarray) -> Raw:
        """The rows of these numbers, missing where a number is below 0."""
        gone, at = rows < 0, np.maximum(rows, 0)
        if not len(self):
            filler = "" if self.values.dtype == object else 0
            offsets = None if self.offsets is None else np.zeros(len(rows) + 1, np.int64)
            values = np.full(len(rows) if offsets is None else 0, filler, self.values.dtype)
            return Raw(values, np.ones(len(rows), bool), offsets)
        missing = gone | self.missing[at]
        if self.offsets is None:
            return Raw(self.values[at], missing)
        lengths = np.where(missing, 0, np.diff(self.offsets)[at])
        values = self.values[spans(self.offsets[at], lengths)]
        return Raw(values, missing, np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))

    def otherwise(self, other: Raw) -> Raw:
        """This column, and the other where this one is missing. Raises `DataError` for a list and a single value."""
        if not self.missing.any() or self.missing.all():
            return other if self.missing.any() else self
        if (self.offsets is None) != (other.offsets is None):
            raise DataError("lists and single values cannot stand in for each other")
        both = joined([self, other])
        return both.take(np.arange(len(self)) + np.where(self.missing, len(self), 0))

    def lists(self, separator: str = "") -> Raw:
        """Every row as a list: a text is cut at each `separator`, blank parts left out; another value is a list of
        itself."""
        if self.offsets is not None:
            return self
        if self.values.dtype != object or not separator:
            lengths = (~self.missing).astype(np.int64)
            return Raw(self.values[~self.missing], self.missing, np.concatenate([[0], lengths.cumsum()]))
        codes, texts = self.keys
        parts = [[p.strip() for p in text.split(separator) if p.strip()] for text in texts]
        return of_lists(parts).take(np.where(self.missing, -1, codes))

    def words(self, ngrams: Sequence[int]) -> Raw:
        """Every row as the list of its lower-cased words, each followed by its character n-grams with a mark at either
        end, of the lengths from `ngrams[0]` to `ngrams[1]` (0: none)."""
        codes, texts = self.keys
        return of_lists([spelled(text, *ngrams) for text in texts]).take(np.where(self.missing, -1, codes))

    def told(self) -> dict[str, Any]:
        """As JSON, exactly."""
        kind = "text" if self.values.dtype == object else str(self.values.dtype)
        found = {"kind": kind, "values": self.values.tolist(), "missing": np.flatnonzero(self.missing).tolist()}
        return found if self.offsets is None else {**found, "offsets": self.offsets.tolist()}

    @classmethod
    def from_told(cls, told: dict[str, Any]) -> Raw:
        """The column that `told` gave."""
        values = np.array(told["values"], object if told["kind"] == "text" else told["kind"])
        offsets = np.array(told["offsets"], np.int64) if "offsets" in told else None
        missing = np.zeros(len(values) if offsets is None else len(offsets) - 1, bool)
        missing[told["missing"]] = True
        return cls(values, missing, offsets)


def joined(columns: Sequence[Raw]) -> Raw:
    """One column after the other; as text where some are text, as decimals where some are."""
    kinds = {c.values.dtype for c in columns}
    parts = [c.values for c in columns]
    if len(kinds) > 1 and np.dtype(object) in kinds:
        parts = [_as_text(c) for c in columns]
    values, missing = np.concatenate(parts), np.concatenate([c.missing for c in columns])
    if columns[0].offsets is None:
        return Raw(values, missing)
    lengths = np.concatenate([np.diff(c.offsets) for c in columns if c.offsets is not None])
    return Raw(values, missing, np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))


def of_lists(lists: Sequence[Sequence[str]]) -> Raw:
    """A column of lists of text, none missing."""
    lengths = np.array([len(row) for row in lists], np.int64)
    values = np.array([v for row in lists for v in row], object)
    return Raw(values, np.zeros(len(lists), bool), np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))


def spelled(text: str, shortest: int, longest: int) -> list[str]:
    """The words of a text in lower case, and after each word its n-grams: "<cat>" has "<ca", "cat" and "at>"."""
    found = []
    for word in text.lower().split():
        marked = f"<{word}>"
        sizes = range(shortest, longest + 1) if shortest else ()
        found += [word, *(f"#{marked[i : i + n]}" for n in sizes for i in range(len(marked) - n + 1))]
    return found


def text_of(value: Any) -> str:
    """A value as a key: text as it is, a whole number without decimals."""
    if isinstance(value, str):
        return value
    number = float(value)
    if _is_whole(value) or (number.is_integer() and abs(number) < _EXACT):
        return str(int(value))
    return repr(number)


def _as_text(column: Raw) -> np.ndarray:
    codes, texts = column.keys
    return np.array(texts, object)[codes] if len(codes) else np.empty(0, object)


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer | np.bool_)
