"""One split of prepared examples on disk: ArrayRecord shards, and sources that give any example by its number.

A source is a grain `RandomAccessDataSource` of dicts of numpy arrays. `MemorySource` holds the whole split decoded in
flat arrays, so that an example is a slice; `DiskSource` reads records when they are asked for. Both also answer for
many examples at once (`read`), which is how the feeding side works. Neither knows what the fields mean.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.data.record import Column, Columns, RawColumns, Schema, decode, encode

SHARD_BYTES = 256 * 2**20
# Groups of one record are what makes reading by number cheap. Numbers of rows hardly shrink (by a fifth), and packing
# them took longer than all the rest of preparing.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READ_AT_ONCE = 8192

Example = dict[str, np.ndarray]


@runtime_checkable
class ExampleSource(Protocol):
    """Examples of one split by number; `lengths` int32 [n] is the length of each example's `items`."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Example: ...

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> Sequence[Example]: ...

    def read(self, indices: np.ndarray, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each field: flat values, and int64 [len(indices)] where in them each example begins."""
        ...


class ShardWriter:
    """Appends records to `<split>-00000-of-0000N.arrayrecord`; the files have these names once `close` returns."""

    def __init__(self, folder: Path, split: str, schema: Schema, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._split, self._schema, self._limit = folder, split, schema, shard_bytes
        self._writer: Any = None
        self._parts: list[Path] = []
        self._room = 0
        self.examples = 0
        self.nbytes = 0

    def add(self, columns: RawColumns) -> None:
        """Append the examples of these columns."""
        for record in encode(columns, self._schema):
            if self._room <= 0:
                self._next_shard()
            self._writer.write(record)
            self._room -= len(record)
            self.examples += 1
            self.nbytes += len(record)

    def close(self) -> list[str]:
        """Finish the files and return their names. A split without examples has no shard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        names = [f"{self._split}-{k:05d}-of-{len(self._parts):05d}.arrayrecord" for k in range(len(self._parts))]
        for part, name in zip(self._parts, names, strict=True):
            part.rename(self._folder / name)
        return names

    def _next_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._writer is not None:
            self._writer.close()
        self._parts.append(self._folder / f"{self._split}-{len(self._parts):05d}.part")
        self._writer = ArrayRecordWriter(str(self._parts[-1]), _WRITER_OPTIONS)
        self._room = self._limit


class MemorySource:
    """A split held decoded in memory."""

    def __init__(self, columns: Columns, lengths: np.ndarray) -> None:
        self.columns = columns
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = _checked(index, len(self))
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> Sequence[Example]:
        return [self[i] for i in indices]

    def read(self, indices: np.ndarray, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = {}
        for name in names:
            column = self.columns[name]
            found[name] = column.values, (indices if column.offsets is None else column.offsets[indices])
        return found


class DiskSource:
    """A split read record by record from its shards."""

    def __init__(self, paths: Sequence[Path], schema: Schema, lengths: np.ndarray) -> None:
        self._paths, self._schema, self.lengths = list(paths), schema, lengths
        self._records: Any = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> Sequence[Example]:
        columns = self._decode([_checked(i, len(self)) for i in indices])
        return [{name: column[k] for name, column in columns.items()} for k in range(len(indices))]

    def read(self, indices: np.ndarray, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        columns = self._decode(indices.tolist())
        count = np.arange(len(indices))
        return {n: (c.values, count if c.offsets is None else c.offsets[:-1]) for n in names for c in [columns[n]]}

    def _decode(self, indices: list[int]) -> dict[str, Column]:
        if not indices:
            return decode([], self._schema)
        try:
            if self._records is None:
                from array_record.python.array_record_data_source import ArrayRecordDataSource

                self._records = ArrayRecordDataSource([str(p) for p in self._paths])
            return decode(self._records.__getitems__(indices), self._schema)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise _damaged(self._paths, error) from error


def read_all(paths: Sequence[Path], schema: Schema, lengths: np.ndarray) -> MemorySource:
    """A whole split decoded into memory. Raises `ExamplesError` when a shard is damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    parts = []
    try:
        for path in paths:
            reader = ArrayRecordReader(str(path))
            for start in range(0, reader.num_records(), _READ_AT_ONCE):
                parts.append(decode(reader.read(start, min(start + _READ_AT_ONCE, reader.num_records())), schema))
            reader.close()
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise _damaged(paths, error) from error
    columns = {field.name: _joined([p[field.name] for p in parts], field.dtype, field.rank) for field in schema}
    if any(len(column) != len(lengths) for column in columns.values()):
        raise _damaged(paths, ValueError(f"not {len(lengths)} examples"))
    return MemorySource(columns, lengths)


def _joined(columns: list[Column], dtype: str, rank: int) -> Column:
    values = np.concatenate([c.values for c in columns]) if columns else np.empty(0, dtype)
    if not rank:
        return Column(values)
    return Column(values, np.concatenate([np.zeros(1, np.int64), *(c.lengths for c in columns)]).cumsum())


def _checked(index: SupportsIndex, count: int) -> int:
    number = operator.index(index)
    if not 0 <= number < count:
        raise IndexError(f"example {number} of {count}")
    return number


def _damaged(paths: Sequence[Path], error: Exception) -> ExamplesError:
    where = str(paths[0].parent / paths[0].name.split("-")[0]) if paths else ""
    return ExamplesError(
        f"prepared examples cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where=f"{where}-*.arrayrecord",
        mend="remove this folder and prepare again",
    )
