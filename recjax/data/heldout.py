"""Batches for evaluation: one held-out target per row, every user exactly once, all processes in step.

Rows go from the longest list of seen items to the shortest, so that the padded width of `seen_ids` takes only a few
values and fits tightly; where the time of the query is told, in order of that time among lists of a similar length,
so that a model whose items change with time meets few times in a batch. The last batch is filled up with rows of
weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.data.batch import Batch
from recjax.data.examples import Examples
from recjax.data.record import Column, spans
from recjax.data.shards import ExampleSource, MemorySource

TIMES = ("none", "history", "target")
_FEW = 16
_SMALLEST_WIDTH = 32
_WIDTH_STEP = 4


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to a process; raises `ConfigError` when they cannot be divided evenly."""
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"a batch of {batch_size} rows cannot be divided by {process_count} processes",
            where="batch_size",
            expected=f"a multiple of {process_count}",
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def seen_widths(longest: int) -> list[int]:
    """The widths that `seen_ids` may have: 32, 128, 512, ... below `longest`, and `longest` rounded up to 8."""
    widths, width = [], _SMALLEST_WIDTH
    while width < longest:
        widths.append(width)
        width *= _WIDTH_STEP
    return [*widths, max(-(-longest // 8) * 8, 8)]


def eval_batches(
    examples: Examples,
    split: str,
    *,
    batch_size: int,
    history_length: int,
    seen_length: int | None = None,
    times: str = "none",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of the batches of a held-out split; every process gets the same number of batches.

    [b = batch_size / process_count]: `history_ids`, `positions`, `segment_ids` (1 on real slots), [b, history_length],
    right-padded, holding the newest events; `label_ids`, `user_index`, `row_weight` [b]; `seen_ids` [b, n]: all events
    before the target, or the field `seen` where the records have one. n is `seen_length`, or one of few widths, the
    same on all processes. With `times` "history" also `history_time`, and with "target" besides it `query_time`
    [b, history_length]: at every real slot the time of the event after it, at the last one that of the target. Raises
    `ExamplesError` for a split without targets or without the times asked for, or one with more seen items than
    `seen_length`.
    """
    if times not in TIMES:
        raise ConfigError(f"times = {times!r}", expected=" or ".join(map(repr, TIMES)))
    schema = [field.name for field in examples.schema(split)]
    for name, needed in (("label", True), ("times", times != "none"), ("label_time", times == "target")):
        if needed and name not in schema:
            raise ExamplesError(
                f"the examples of the split {split!r} have no {name}",
                where=str(examples.path),
                expected="valid or test" if name == "label" else "a log with timestamps",
            )
    rows = process_rows(batch_size, process_index, process_count)
    source = examples.source(split)
    longest = int(seen_of(source).lengths.max(initial=0))
    if seen_length is not None and seen_length < longest:
        raise ExamplesError(
            f"a user has seen {longest} items", where=f"seen_length = {seen_length}", expected=f"at least {longest}"
        )
    return _batches(source, rows, batch_size, history_length, seen_length, times)


def _batches(
    source: ExampleSource, rows: slice, batch_size: int, history_length: int, seen_length: int | None, times: str
):
    order = np.argsort(-source.lengths, kind="stable")
    if times == "target" and len(order):
        # Lengths up to the same power of two (16, 32, ...), which have the same width in whatever order they come.
        bucket = np.ceil(np.log2(np.maximum(source.lengths, _FEW)))
        values, at = source.read(np.arange(len(order)), ["label_time"])["label_time"]
        order = np.lexsort((values[at], -bucket))
    seen = seen_of(source).lengths
    widths = [seen_length] if seen_length is not None else seen_widths(int(seen.max(initial=0)))
    for start in range(0, len(order), batch_size):
        longest = int(seen[order[start : start + batch_size]].max())
        width = next(w for w in widths if w >= longest)
        mine = order[start : start + batch_size][rows]
        yield _batch(source, mine, rows.stop - rows.start, history_length, width, times)


def _batch(source: ExampleSource, indices: np.ndarray, size: int, history_length: int, width: int, times: str) -> Batch:
    batch: Batch = {k: np.zeros((size, history_length), np.int32) for k in ("history_ids", "positions", "segment_ids")}
    batch["label_ids"] = np.zeros(size, np.int32)
    batch["user_index"] = np.full(size, -1, np.int64)
    batch["row_weight"] = np.zeros(size, np.float32)
    batch["seen_ids"] = np.zeros((size, width), np.int32)
    timed = {"none": (), "history": ("history_time",), "target": ("history_time", "query_time")}[times]
    batch |= {name: np.zeros((size, history_length), np.int64) for name in timed}
    if not len(indices):
        return batch
    fields = {"none": (), "history": ("times",), "target": ("times", "label_time")}[times]
    found = source.read(indices, ["items", "label", "user_index", *fields])
    number = np.arange(len(indices))
    for name, field in (("label_ids", "label"), ("user_index", "user_index")):
        values, at = found[field]
        batch[name][number] = values[at]
    batch["row_weight"][number] = 1
    whole = source.lengths[indices].astype(np.int64)
    items, begins = found["items"]
    fill_seen(batch["seen_ids"], source, indices, items, begins)
    length = np.minimum(whole, history_length)
    slots = spans(number * history_length, length)
    batch["history_ids"].reshape(-1)[slots] = items[spans(begins + whole - length, length)]
    batch["positions"].reshape(-1)[slots] = spans(np.zeros_like(length), length)
    batch["segment_ids"].reshape(-1)[slots] = 1
    if timed:
        values, begins = found["times"]
        batch["history_time"].reshape(-1)[slots] = values[spans(begins + whole - length, length)]
    if times == "target":
        later, (labels, at) = np.maximum(length - 1, 0), found["label_time"]
        query_time = batch["query_time"].reshape(-1)
        query_time[spans(number * history_length, later)] = values[spans(begins + whole - later, later)]
        held = length > 0
        query_time[(number * history_length + length - 1)[held]] = labels[at][held]
    return batch


class _Seen(NamedTuple):
    lengths: np.ndarray
    column: Column | None


def seen_of(source: ExampleSource) -> _Seen:
    """How many items each user has had, and the column that says which, where they are not the items of the record."""
    if isinstance(source, MemorySource) and "seen" in source.columns:
        column = source.columns["seen"]
        return _Seen(column.lengths, column)
    return _Seen(source.lengths.astype(np.int64), None)


def fill_seen(
    out: np.ndarray, source: ExampleSource, indices: np.ndarray, items: np.ndarray, begins: np.ndarray
) -> None:
    """Write what the users at `indices` have had into the rows of `out`, one user a row, from the left."""
    lengths, column = seen_of(source)
    if column is not None and column.offsets is not None:
        items, begins = column.values, column.offsets[indices]
    lengths = lengths[indices].astype(np.int64)
    at = np.arange(len(indices)) * out.shape[1]
    out.reshape(-1)[spans(at, lengths)] = items[spans(begins, lengths)]
