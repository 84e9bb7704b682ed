"""The bytes of one example, and the same many at a time.

A split has a schema: an ordered list of named fields, each a number or a list of numbers of one type. A record is
nothing but 32-bit little-endian words: first the length of every list field, then the values of the fields in schema
order. Because everything lies on word boundaries, thousands of records are written or read by a handful of numpy
calls. No text, no nesting, no missing values: a field is there in every record of a split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_WORD = np.dtype("<u4")


@dataclass(frozen=True, kw_only=True)
class Field:
    """`rank` 0 is one value per example, 1 a list. The type is a numpy name of 4 or 8 bytes, such as int32."""

    name: str
    dtype: str
    rank: int

    def __post_init__(self) -> None:
        if self.rank not in (0, 1) or np.dtype(self.dtype).itemsize not in (4, 8):
            raise ValueError(f"field {self.name}: rank {self.rank} of {self.dtype} cannot be stored")

    @property
    def words(self) -> int:
        """32-bit words of one value."""
        return np.dtype(self.dtype).itemsize // 4


Schema = Sequence[Field]


@dataclass(frozen=True)
class Column:
    """A field of many examples: one value each, or lists, of which number i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if self.offsets is None:
            return self.values[index, ...]
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]: how many values each example has."""
        return np.ones(len(self), np.int64) if self.offsets is None else np.diff(self.offsets)


Columns = Mapping[str, Column]


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: `starts[0], starts[0]+1, ...` for `lengths[0]` numbers, then the same from `starts[1]`, and so on."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def encode(columns: Columns, schema: Schema) -> tuple[bytes, np.ndarray]:
    """All records one after the other, and their bounds in bytes (int64 [n + 1])."""
    count = len(columns[schema[0].name])
    sizes = _sizes([_lengths(columns[f.name], f) for f in schema], schema)
    ends = np.cumsum(sizes["record"], dtype=np.int64)
    bounds = np.concatenate([np.zeros(1, np.int64), ends])
    words = np.empty(int(bounds[-1]), _WORD)
    at = bounds[:count].copy()
    for field in schema:
        if field.rank:
            words[at] = _lengths(columns[field.name], field)
            at += 1
    for field in schema:
        column = columns[field.name]
        values = np.ascontiguousarray(column.values, np.dtype(field.dtype).newbyteorder("<"))
        if column.offsets is not None:
            values = values[column.offsets[0] : column.offsets[-1]]
        words[spans(at, sizes[field.name])] = values.view(_WORD)
        at += sizes[field.name]
    return words.tobytes(), bounds * 4


def decode(records: Iterable[bytes], schema: Schema) -> dict[str, Column]:
    """The columns of records in the order given. Raises `ValueError` when a record does not fit the schema."""
    records = list(records)
    nbytes = np.fromiter(map(len, records), np.int64, len(records))
    words = np.frombuffer(b"".join(records), _WORD) if not (nbytes % 4).any() else np.empty(0, _WORD)
    ends = np.cumsum(nbytes // 4)
    at = ends - nbytes // 4
    ranks = sum(field.rank for field in schema)
    if len(words) * 4 != nbytes.sum() or (nbytes < 4 * ranks).any():
        raise ValueError("a record is cut short")
    lengths = []
    for field in schema:
        lengths.append(words[at].astype(np.int64) if field.rank else np.ones(len(records), np.int64))
        at = at + field.rank
    sizes = _sizes(lengths, schema)
    if not np.array_equal(sizes["record"], nbytes // 4):
        raise ValueError("a record does not have the length that its schema says")
    columns = {}
    for field, length in zip(schema, lengths, strict=True):
        values = words[spans(at, sizes[field.name])].view(np.dtype(field.dtype).newbyteorder("<"))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)]) if field.rank else None
        columns[field.name] = Column(values.astype(field.dtype, copy=False), offsets)
        at = at + sizes[field.name]
    return columns


def _lengths(column: Column, field: Field) -> np.ndarray:
    if (column.offsets is not None) != bool(field.rank):
        raise ValueError(f"field {field.name} is of rank {field.rank}, its column is not")
    return column.lengths


def _sizes(lengths: Sequence[np.ndarray], schema: Schema) -> dict[str, np.ndarray]:
    """Words of each field of each record, and of the whole record under "record"."""
    sizes = {f.name: length * f.words for f, length in zip(schema, lengths, strict=True)}
    return {**sizes, "record": np.sum(list(sizes.values()), axis=0) + sum(f.rank for f in schema)}
