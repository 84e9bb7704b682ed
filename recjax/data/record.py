"""The bytes of one example, and the same many at a time.

A split has a schema: an ordered list of named fields, each a number or a list of numbers of one type. A record is
nothing but 32-bit little-endian words: first the length of every list field, then the values of the fields in schema
order. Because everything lies on word boundaries, thousands of records are read by a handful of numpy calls. No
text, no nesting, no missing values: a field is there in every record of a split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    @property
    def starts(self) -> np.ndarray:
        """int64 [n]: where in `values` each example begins."""
        return np.arange(len(self.values)) if self.offsets is None else self.offsets[:-1]

    def part(self, start: int, stop: int) -> Column:
        """The examples from `start` up to, and without, `stop`."""
        if self.offsets is None:
            return Column(self.values[start:stop])
        return Column(self.values, self.offsets[start : stop + 1])

    def joined(self) -> Column:
        """The same with `values` of these examples alone."""
        if self.offsets is None:
            return self
        return Column(self.values[self.offsets[0] : self.offsets[-1]], self.offsets - self.offsets[0])


@dataclass(frozen=True)
class Runs:
    """Lists that are runs of one array, which may overlap: number i is the `lengths[i]` values from `starts[i]` on.

    The splits of a log are told so without a copy of it.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index] + self.lengths[index]]

    def part(self, start: int, stop: int) -> Runs:
        """The examples from `start` up to, and without, `stop`."""
        return Runs(self.values, self.starts[start:stop], self.lengths[start:stop])

    def joined(self) -> Column:
        """The same lists one after the other."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        return Column(self.values[spans(self.starts, self.lengths)], offsets)


Columns = Mapping[str, Column]
RawColumns = Mapping[str, Column | Runs]


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: `starts[0], starts[0]+1, ...` for `lengths[0]` numbers, then the same from `starts[1]`, and so on."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def encode(columns: RawColumns, schema: Schema) -> Iterator[bytes]:
    """The record of each example, one at a time.

    Raises `ValueError` where a column is not of the rank that the schema says.
    """
    lengths = [_lengths(columns[f.name], f).astype(_WORD) for f in schema if f.rank]
    single, pieces = [length[:, None] for length in lengths], []
    for field in schema:
        column = columns[field.name]
        values = np.ascontiguousarray(column.values, np.dtype(field.dtype).newbyteorder("<"))
        if field.rank:
            pieces += [*_rows(single), _cut(values, column.starts, column.lengths)]
            single = []
        else:
            _lengths(column, field)
            single.append(values.view(_WORD).reshape(-1, field.words))
    return map(b"".join, zip(*pieces, *_rows(single), strict=True))


def _rows(single: Sequence[np.ndarray]) -> list[Iterator[memoryview]]:
    """What single values of a record that follow each other are together, if there are any; words [n, k] each."""
    if not single:
        return []
    words = np.concatenate(single, axis=1)
    count, width = words.shape
    return [_cut(words.reshape(-1), np.arange(count) * width, np.full(count, width))]


def _cut(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[memoryview]:
    """The bytes of so many values from each start on."""
    data, size = values.view(np.uint8).data, values.itemsize
    for start, end in zip((starts * size).tolist(), ((starts + lengths) * size).tolist(), strict=True):
        yield data[start:end]


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


def _lengths(column: Column | Runs, field: Field) -> np.ndarray:
    if (isinstance(column, Runs) or column.offsets is not None) != bool(field.rank):
        raise ValueError(f"field {field.name} is of rank {field.rank}, its column is not")
    return column.lengths


def _sizes(lengths: Sequence[np.ndarray], schema: Schema) -> dict[str, np.ndarray]:
    """Words of each field of each record, and of the whole record under "record"."""
    sizes = {f.name: length * f.words for f, length in zip(schema, lengths, strict=True)}
    return {**sizes, "record": np.sum(list(sizes.values()), axis=0) + sum(f.rank for f in schema)}
