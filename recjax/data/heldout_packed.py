"""Batches for evaluation with several users in a row, for models that keep segments apart.

Histories differ much in length, and a row that holds one of them is mostly padding. Here rows are packed like those
of training, and `query_at` says at which slots of a row its users' queries are. Rows with equally many users stand
together; a batch has fewer rows where a row has more users, so that it always asks about as many.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recjax.data.batch import Batch
from recjax.data.heldout import fill_seen, seen_of, seen_widths
from recjax.data.packing import pack
from recjax.data.record import spans
from recjax.data.shards import ExampleSource

_SHORTEST_ROW = 16
_TIMES = {"none": (), "history": ("history_time",), "target": ("history_time", "query_time")}


def packed_batches(
    source: ExampleSource,
    *,
    users: int,
    row_length: int,
    times: str = "none",
    parts: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of the batches of a held-out source, about `users` users each, every user exactly once.

    The number of rows r is a multiple of `parts`, itself one of `process_count`. `history_ids`, `positions`,
    `segment_ids`, and the times that `eval_batches` has, [r, l] where l is `row_length` or, when all histories are
    shorter, less; `query_at` [r, q]: the slot of each user's last event, -1 where there is no user, or none with a
    history; `label_ids`, `user_index`, `row_weight` [r * q] and `seen_ids` [r * q, n], row by row. q is a power of
    two, n one of a few widths. All processes have the same shapes.
    """
    lengths = np.minimum(source.lengths.astype(np.int64), row_length)
    row_length = _row_length(int(lengths.max(initial=1)), row_length)
    plan, seen = pack(np.maximum(lengths, 1), row_length), seen_of(source).lengths
    widths = seen_widths(int(seen.max(initial=0)))
    held = np.bincount(plan.row, minlength=plan.num_rows)
    most = np.zeros(plan.num_rows, np.int64)
    np.maximum.at(most, plan.row, seen)
    order = np.lexsort((-most, -held))  # rows with most users first, among them those with the longest lists
    by_row = np.lexsort((plan.offset, plan.row))  # users row after row
    first = np.concatenate([[0], np.cumsum(held)])
    start = 0
    while start < len(order):
        asked = 1 << int(held[order[start]] - 1).bit_length()
        size = -(-max(users // asked, 1) // parts) * parts
        rows = order[start : start + size]
        start += size
        width = next(w for w in widths if w >= most[rows].max())
        local = size // process_count
        mine = rows[process_index * local : (process_index + 1) * local]
        members = by_row[spans(first[mine], held[mine])]
        place = np.repeat(np.arange(len(mine)), held[mine])
        yield _batch(
            source, members, lengths[members], place, plan.offset[members], (local, asked, width, row_length), times
        )


def _row_length(longest: int, most: int) -> int:
    """`most`, or the next power of two that holds the longest history."""
    return min(most, max(_SHORTEST_ROW, 1 << (longest - 1).bit_length()))


def _batch(
    source: ExampleSource,
    members: np.ndarray,
    lengths: np.ndarray,
    row: np.ndarray,
    offset: np.ndarray,
    shape: tuple[int, int, int, int],
    times: str,
) -> Batch:
    """The rows with these users, which have their rows in order; see `packed_batches`."""
    size, asked, width, row_length = shape
    batch: Batch = {k: np.zeros((size, row_length), np.int32) for k in ("history_ids", "positions", "segment_ids")}
    batch |= {name: np.zeros((size, row_length), np.int64) for name in _TIMES[times]}
    batch["query_at"] = np.full((size, asked), -1, np.int32)
    batch["label_ids"] = np.zeros(size * asked, np.int32)
    batch["user_index"] = np.full(size * asked, -1, np.int64)
    batch["row_weight"] = np.zeros(size * asked, np.float32)
    batch["seen_ids"] = np.zeros((size * asked, width), np.int32)
    if not len(members):
        return batch
    fields = {"none": (), "history": ("times",), "target": ("times", "label_time")}[times]
    found = source.read(members, ["items", "label", "user_index", *fields])
    items, begins = found["items"]
    number = np.arange(len(members)) - np.searchsorted(row, row)  # of the user in its row
    query, real = row * asked + number, lengths > 0
    for name, field in (("label_ids", "label"), ("user_index", "user_index")):
        values, at = found[field]
        batch[name][query] = values[at]
    batch["row_weight"][query] = 1
    batch["query_at"].reshape(-1)[query[real]] = (offset + lengths - 1)[real]
    seen = np.zeros((len(members), width), np.int32)
    fill_seen(seen, source, members, items, begins)
    batch["seen_ids"][query] = seen
    begin = row * row_length + offset
    slots = spans(begin, lengths)
    newest = begins + source.lengths[members] - lengths
    batch["history_ids"].reshape(-1)[slots] = items[spans(newest, lengths)]
    batch["positions"].reshape(-1)[slots] = spans(np.zeros_like(lengths), lengths)
    batch["segment_ids"].reshape(-1)[slots] = np.repeat(number + 1, lengths)
    if times != "none":
        when, begins = found["times"]
        newest = begins + source.lengths[members] - lengths
        batch["history_time"].reshape(-1)[slots] = when[spans(newest, lengths)]
    if times == "target":
        later, (labels, at) = np.maximum(lengths - 1, 0), found["label_time"]
        query_time = batch["query_time"].reshape(-1)
        query_time[spans(begin, later)] = when[spans(newest + 1, later)]
        query_time[(begin + lengths - 1)[real]] = labels[at][real]
    return batch
