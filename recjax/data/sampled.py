"""Examples to be read again and again: splits decoded once, cut to a fixed sample of users, or seen through a view.

Evaluating every so many steps of training reads the same split each time, and often a part of its users is enough.
The sample depends on its size and seed alone, so two runs are measured on the same users. A view
(`recjax.data.views`) changes the records of one split and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsIndex

import numpy as np

from recjax.data.examples import MEMORY_BYTES, Examples
from recjax.data.record import Column, Columns, Field
from recjax.data.shards import ExampleSource, MemorySource

View = Callable[[Columns], Columns]


@dataclasses.dataclass(frozen=True)
class HeldExamples(Examples):
    """Examples whose splits are decoded once; held-out splits hold at most `max_users`, drawn by `seed`."""

    max_users: int | None
    seed: int
    viewed: Mapping[str, Columns] = dataclasses.field(default_factory=dict)

    def source(self, split: str, *, memory_bytes: int = MEMORY_BYTES) -> ExampleSource:
        if split not in self._sources:
            if split in self.viewed:
                columns = self.viewed[split]
                self._sources[split] = MemorySource(columns, columns["items"].lengths.astype(np.int32))
                return self._sources[split]
            source = super().source(split, memory_bytes=memory_bytes)
            if split != "train" and self.max_users is not None and len(source) > self.max_users:
                source = _Sample(source, self.max_users, self.seed)
            self._sources[split] = source
        return self._sources[split]

    def schema(self, split: str) -> tuple[Field, ...]:
        if split not in self.viewed:
            return super().schema(split)
        columns = self.viewed[split].items()
        return tuple(Field(name=n, dtype=c.values.dtype.name, rank=int(c.offsets is not None)) for n, c in columns)

    def columns(self, split: str) -> Columns:
        """All records of a split, decoded."""
        source, fields = self.source(split), self.schema(split)
        if isinstance(source, MemorySource):
            return source.columns
        records = source.__getitems__(range(len(source)))
        return {field.name: _column([record[field.name] for record in records], field) for field in fields}

    def through(self, split: str, view: View) -> HeldExamples:
        """The same examples with the records of one split changed by `view`."""
        return dataclasses.replace(self, viewed={**self.viewed, split: view(self.columns(split))})

    @functools.cached_property
    def _sources(self) -> dict[str, ExampleSource]:
        return {}


def _column(values: list[np.ndarray], field: Field) -> Column:
    if not field.rank:
        return Column(np.array(values, field.dtype))
    lengths = np.array([len(v) for v in values], np.int64)
    return Column(np.concatenate([np.zeros(0, field.dtype), *values]), np.concatenate([[0], np.cumsum(lengths)]))


class _Sample:
    """Some examples of a source, in its order."""

    def __init__(self, source: ExampleSource, size: int, seed: int) -> None:
        self._source = source
        self._indices = np.sort(np.random.default_rng(seed).choice(len(source), size, replace=False))
        self.lengths = source.lengths[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        return self._source[self._indices[index]]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> Sequence[dict[str, np.ndarray]]:
        return [self[i] for i in indices]

    def read(self, indices: np.ndarray, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return self._source.read(self._indices[indices], names)
