"""What a kind of task hands over: raw examples, and the steps that turn them into the examples of each split.

A kind (`next_item.py` and others to come) reads its tables once and describes its work here; `seqio_bridge` builds a
`seqio.Task` from it, and `examples_of` does the same in plain numpy, one example at a time. All but the spelling of
text is done for many examples at a time, by the kind itself. Nothing random: windows, masks and negatives belong to the
feeding side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recjax.data.record import Column, Field, RawColumns, Schema
from recjax.data.sources import DataDir
from recjax.data.text import TextVocab, Tokenizer
from recjax.data.vocab import ItemVocab

Example = dict[str, Any]
AT_ONCE = 2048  # examples, whose events fit the cache of a processor


@dataclass(frozen=True)
class Encode:
    """Replace the text of a field by the ids of its pieces, with `prompt` in front of it."""

    name: str
    vocab: TextVocab
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A task with its data read.

    `raw[split]` are the columns that a split starts from, `steps` the texts that are spelt in the examples of any
    split, `schemas[split]` the fields that come out. The polars frames `items` (row, item_id, train_count, perhaps
    title) and `users` (user_index, user_id) go into the prepared folder, `facts` into its manifest, `text` (the
    vocabulary of the field of that name) and `files` (content by name) beside them.
    """

    name: str
    raw: Mapping[str, RawColumns]
    steps: Sequence[Encode]
    schemas: Mapping[str, Schema]
    vocab: ItemVocab
    items: Any
    users: Any
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: Tokenizer | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A kind of task over a data directory: a frozen dataclass with these, listed in `registry.KINDS`."""

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> DataDir: ...

    def work(self) -> Work:
        """Read the data. Raises `DataError` when it does not have what the task needs."""
        ...


def examples_of(work: Work, split: str) -> Iterator[Example]:
    """The examples of a split in plain numpy, one at a time; what `seqio_bridge` gives must equal this."""
    raw = work.raw[split]
    for index in range(count(raw)):
        example = {name: column[index] for name, column in raw.items()}
        for step in work.steps:
            example[step.name] = step.vocab.encode(step.prompt + np.asarray(example[step.name]).item())
        yield example


def count(columns: RawColumns) -> int:
    """The number of examples in columns."""
    return len(next(iter(columns.values())))


def in_parts(columns: RawColumns, size: int) -> Iterator[RawColumns]:
    """The columns again, `size` examples at a time."""
    for start in range(0, count(columns), size):
        yield {name: column.part(start, start + size) for name, column in columns.items()}


def columns_of(examples: Sequence[Example], schema: Schema) -> dict[str, Column]:
    """Examples one by one as columns."""
    return {f.name: _column([e[f.name] for e in examples], f) for f in schema}


def _column(values: list[Any], spec: Field) -> Column:
    if not spec.rank:
        return Column(np.array(values, spec.dtype))
    lengths = np.array([len(v) for v in values], np.int64)
    flat = np.concatenate([np.empty(0, spec.dtype), *values]).astype(spec.dtype, copy=False)
    return Column(flat, np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))
