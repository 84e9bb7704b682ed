"""Fields after fitting: what turns raw columns into rows of the shared table, numbers and vectors.

A field of rows is a coding (which row of its own a value has: vocabulary, hash or ranges) and a layout (one value, a
bag of them, or a sequence). All of it is exact in the sense that a row alone gives the same bytes as the same row among
a million, which is what training and serving with one code rests on. Numpy and JSON only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recjax.core.errors import DataError
from recjax.data.fields import FIRST_VALUE, MISSING, PRESENT, UNKNOWN, FieldShape
from recjax.data.hashing import hashed_with, mixed
from recjax.data.raw import Raw
from recjax.data.record import spans
from recjax.data.vocab import stable_hash

_NOTHING = np.uint64(0x6E6F7468696E67)  # what a missing value counts as in a cross
Columns = Mapping[str, Raw]
_FEW, _SPELT = 4096, 65_536  # rows whose texts are looked up among those spelt before, and how many of these are kept


@dataclass(frozen=True)
class Vocabulary:
    """A row for each of these texts."""

    texts: tuple[str, ...]

    @property
    def rows(self) -> int:
        return FIRST_VALUE + len(self.texts)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: FIRST_VALUE + k for k, text in enumerate(self.texts)}

    def __call__(self, column: Raw) -> np.ndarray:
        codes, texts = column.keys
        return np.array([self._row_of.get(text, UNKNOWN) for text in texts], np.int64)[codes]

    def told(self) -> dict[str, Any]:
        """As JSON; `coding_of` reads it."""
        return {"vocabulary": list(self.texts)}


@dataclass(frozen=True)
class Hash:
    """A row for each remainder of a hash by `buckets`; `number` tells several hashes of a value apart."""

    buckets: int
    number: int = 0

    @property
    def rows(self) -> int:
        return FIRST_VALUE + self.buckets

    def __call__(self, column: Raw) -> np.ndarray:
        codes, texts = column.keys
        return self.of(stable_hash(texts))[codes]

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """int64: rows of values with these hashes (uint64)."""
        numbered = mixed(hashes ^ np.uint64(self.number))
        return (FIRST_VALUE + (numbered % np.uint64(self.buckets)).astype(np.int64)).astype(np.int64)

    def told(self) -> dict[str, Any]:
        return {"buckets": self.buckets, "number": self.number}


@dataclass(frozen=True)
class Ranges:
    """A row for what lies below the first edge, between two, and from the last on."""

    edges: tuple[float, ...]

    @property
    def rows(self) -> int:
        return FIRST_VALUE + len(self.edges) + 1

    def __call__(self, column: Raw) -> np.ndarray:
        return FIRST_VALUE + np.searchsorted(np.array(self.edges), column.numbers("a field of ranges"), side="right")

    def told(self) -> dict[str, Any]:
        return {"edges": list(self.edges)}


# Values -> rows of a field, from `UNKNOWN` on: int64 for every entry of a column's `values`. What is missing is dealt
# with by the layout.
Coding = Vocabulary | Hash | Ranges


def coding_of(told: Mapping[str, Any]) -> Coding:
    """The coding that `told` describes."""
    if "vocabulary" in told:
        return Vocabulary(tuple(told["vocabulary"]))
    return Ranges(tuple(told["edges"])) if "edges" in told else Hash(told["buckets"], told["number"])


@dataclass(frozen=True)
class OneRow:
    """One value in a row. Of several columns it is their cross: all together are hashed, and only where all are missing
    is the cross missing."""

    shape: FieldShape
    columns: tuple[str, ...]
    coding: Coding

    def __call__(self, columns: Columns) -> np.ndarray:
        """int32 [n, 1]: rows of the shared table."""
        parts = [_single(columns, name, self.shape.name) for name in self.columns]
        if len(parts) == 1:
            missing, rows = parts[0].missing, self.coding(parts[0])
        else:
            assert isinstance(self.coding, Hash)
            missing, state = np.logical_and.reduce([p.missing for p in parts]), np.zeros(len(parts[0]), np.uint64)
            for part in parts:
                codes, texts = part.keys
                value = np.where(part.missing, _NOTHING, stable_hash(texts)[codes])
                state = hashed_with(mixed(state), value)
            rows = self.coding.of(state)
        return (self.shape.offset + np.where(missing, MISSING, rows)).astype(np.int32)[:, None]

    def told(self) -> dict[str, Any]:
        return {"columns": list(self.columns), "one": self.coding.told()}


@dataclass(frozen=True)
class ManyRows:
    """Several values in a row, or with several codings (hashes) several rows for one value.

    A row whose list is missing has the row for "missing", one whose list is empty has none. `last` keeps the last
    `shape.width` instead of the first.
    """

    shape: FieldShape
    column: str
    codings: tuple[Coding, ...]
    separator: str = ""
    last: bool = False
    words: tuple[int, ...] = ()

    def __call__(self, columns: Columns) -> np.ndarray:
        """int32 [n, width]: rows of the shared table, 0 padded on the right."""
        column = _column(columns, self.column, self.shape.name)
        if not self.words:
            return self._rows(column.lists(self.separator))
        return self._remembered(column) if len(column) <= _FEW else self._rows(column.words(self.words))

    @functools.cached_property
    def _spelt(self) -> dict[str, np.ndarray]:
        return {}

    def _remembered(self, column: Raw) -> np.ndarray:
        """The same for few rows: a server meets the same titles again and again, and spelling them takes long."""
        codes, texts = column.keys
        found = {text: self._spelt.get(text) for text in texts}
        if new := [text for text, rows in found.items() if rows is None]:
            plain = Raw(np.array(new, object), np.zeros(len(new), bool))
            found |= zip(new, self._rows(plain.words(self.words)), strict=True)
            if len(self._spelt) > _SPELT:
                self._spelt.clear()
            self._spelt.update((text, rows) for text in new if (rows := found[text]) is not None)
        each = [rows for rows in found.values() if rows is not None]
        rows = np.stack(each)[codes] if each else np.zeros((len(column), self.shape.width), np.int32)
        rows[column.missing] = 0
        rows[column.missing, 0] = self.shape.offset + MISSING
        return rows

    def _rows(self, column: Raw) -> np.ndarray:
        assert column.offsets is not None
        lengths = np.diff(column.offsets)
        kept = np.minimum(lengths, self.shape.width // len(self.codings))
        begins = column.offsets[:-1] + (lengths - kept if self.last else 0)
        found = np.stack([coding(column) for coding in self.codings], axis=1)[spans(begins, kept)]
        rows = np.zeros((len(column), self.shape.width), np.int32)
        filled = kept * len(self.codings)
        rows.reshape(-1)[spans(np.arange(len(column)) * self.shape.width, filled)] = self.shape.offset + found.ravel()
        rows[column.missing, 0] = self.shape.offset + MISSING
        return rows

    def told(self) -> dict[str, Any]:
        layout = {"separator": self.separator, "last": self.last, "words": list(self.words)}
        return {"columns": [self.column], "many": [c.told() for c in self.codings], **layout}


@dataclass(frozen=True)
class Number:
    """A number on the scale of the training rows. `quantiles` (ascending) replace `mean` and `deviation`."""

    shape: FieldShape
    column: str
    log: bool
    mean: float
    deviation: float
    quantiles: tuple[float, ...]
    clip: float
    presence: bool

    def __call__(self, columns: Columns) -> np.ndarray:
        """float32 [n, 1], or [n, 2] with the presence bit."""
        column = _single(columns, self.column, self.shape.name)
        value = transformed(column.numbers(f"field {self.shape.name}"), self.log)
        if self.quantiles:
            value = 2 * np.interp(value, self.quantiles, np.linspace(0, 1, len(self.quantiles))) - 1
        value = np.clip((value - self.mean) / self.deviation, -self.clip, self.clip)
        value = np.where(column.missing, 0.0, value)
        return np.stack([value, ~column.missing][: 1 + self.presence], axis=1).astype(np.float32)

    def told(self) -> dict[str, Any]:
        scale = {"log": self.log, "mean": self.mean, "deviation": self.deviation, "quantiles": list(self.quantiles)}
        return {"columns": [self.column], "number": {**scale, "clip": self.clip, "presence": self.presence}}


def transformed(values: np.ndarray, log: bool) -> np.ndarray:
    """float64: the values, or sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(np.ascontiguousarray(values))) if log else values


@dataclass(frozen=True)
class Vectors:
    """Vectors by id; `array` float32 [1 + ids, width], whose first row is zero and stands for none."""

    shape: FieldShape
    column: str
    ids: tuple[str, ...]
    array: np.ndarray
    presence: bool

    @functools.cached_property
    def _place_of(self) -> dict[str, int]:
        return {text: 1 + k for k, text in enumerate(self.ids)}

    def __call__(self, columns: Columns) -> np.ndarray:
        """int32 [n, 1]: rows of `array`."""
        column = _single(columns, self.column, self.shape.name)
        codes, texts = column.keys
        places = np.array([self._place_of.get(text, 0) for text in texts], np.int64)[codes]
        return np.where(column.missing, 0, places).astype(np.int32)[:, None]

    def told(self) -> dict[str, Any]:
        return {"columns": [self.column], "vectors": {"ids": list(self.ids), "presence": self.presence}}


Fitted = OneRow | ManyRows | Number | Vectors


def fitted_of(shape: FieldShape, told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Fitted:
    """The field that `told` describes."""
    columns = tuple(told["columns"])
    if "one" in told:
        return OneRow(shape, columns, coding_of(told["one"]))
    if "many" in told:
        codings = tuple(map(coding_of, told["many"]))
        return ManyRows(shape, columns[0], codings, told["separator"], told["last"], tuple(told["words"]))
    if "number" in told:
        number = {**told["number"], "quantiles": tuple(told["number"]["quantiles"])}
        return Number(shape, columns[0], **number)
    return Vectors(shape, columns[0], tuple(told["vectors"]["ids"]), arrays[shape.name], told["vectors"]["presence"])


def presence_shapes(field: Fitted) -> Sequence[FieldShape]:
    """The presence bit of a field, where it has one."""
    bits = isinstance(field, Number | Vectors) and field.presence
    return [FieldShape(name=field.shape.name + PRESENT, kind="numeric")] if bits else []


def _column(columns: Columns, name: str, field: str) -> Raw:
    if name not in columns:
        known = ", ".join(sorted(columns))
        raise DataError(f"there is no column {name}", where=f"field {field}", expected=f"one of {known}")
    return columns[name]


def _single(columns: Columns, name: str, field: str) -> Raw:
    column = _column(columns, name, field)
    if column.offsets is not None:
        raise DataError(
            f"the column {name} holds lists",
            where=f"field {field}",
            expected="one value in each row",
            mend="declare it as MultiValued or SequenceOf",
        )
    return column
