"""Every token of held-out documents exactly once, in packed rows: batches for the likelihood of text.

A document longer than a row is cut into windows, each of which begins to read anew; the first token of a document is
never predicted. Where the records say with `loss` which tokens are, the others only stand before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from recjax.data.batch import Batch
from recjax.data.packing import pack
from recjax.data.record import Columns, spans


class Told(NamedTuple):
    """A batch, and the document that each of its slots is of (int64 [b * l] of all processes, -1 where padded)."""

    batch: Batch
    document: np.ndarray


def text_batches(
    columns: Columns, *, row_length: int, slots: int, parts: int = 1, process_index: int = 0, process_count: int = 1
) -> Iterator[Told]:
    """This process's rows of batches of about `slots` slots, in a multiple of `parts` rows.

    `history_ids`, `target_ids`, `positions`, `segment_ids` int32 [b, row_length] and `weight` float32, 1 where the
    target counts. Documents of one token have nothing to predict and are left out.
    """
    items = columns["items"]
    assert items.offsets is not None
    loss = columns["loss"].values if "loss" in columns else np.ones(len(items.values), np.int32)
    targets = np.maximum(items.lengths - 1, 0)
    windows = -(-targets // row_length)
    document = np.repeat(np.arange(len(targets)), windows)
    skipped = (np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)) * row_length
    length = np.minimum(targets[document] - skipped, row_length)
    begin = items.offsets[document] + skipped
    plan = pack(length, row_length)
    size = -(-max(min(slots // row_length, plan.num_rows), 1) // parts) * parts
    by_row = np.lexsort((plan.offset, plan.row))
    bounds = np.searchsorted(plan.row[by_row], np.arange(plan.num_rows + size + 1))
    for first in range(0, plan.num_rows, size):
        chosen = by_row[bounds[first] : bounds[first + size]]
        names = ("history_ids", "target_ids", "positions", "segment_ids")
        batch: Batch = {name: np.zeros((size, row_length), np.int32) for name in names}
        batch["weight"] = np.zeros((size, row_length), np.float32)
        flat = {name: x.reshape(-1) for name, x in batch.items()}
        of = np.full(size * row_length, -1, np.int64)
        many = length[chosen]
        to = spans((plan.row[chosen] - first) * row_length + plan.offset[chosen], many)
        read = spans(begin[chosen], many)
        flat["history_ids"][to], flat["target_ids"][to] = items.values[read], items.values[read + 1]
        flat["positions"][to] = spans(np.zeros_like(many), many)
        flat["segment_ids"][to] = np.repeat(plan.segment[chosen], many)
        flat["weight"][to] = loss[read + 1] > 0
        of[to] = np.repeat(document[chosen], many)
        local = size // process_count
        mine = slice(process_index * local, (process_index + 1) * local)
        yield Told({name: x[mine] for name, x in batch.items()}, of)
