"""Several windows in one row: best-fit decreasing packing.

The longest window goes first, each into the fullest row that still has room for it, and a new row begins where none
has. A window is never split. Only lengths matter here; which rows stand next to each other is decided by a seeded
shuffle elsewhere, because this order is by length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Window k lies in row `row[k]`, from slot `offset[k]` on, as segment `segment[k]` (1, 2, ... in a row)."""

    row: np.ndarray
    offset: np.ndarray
    segment: np.ndarray
    num_rows: int


def pack(lengths: np.ndarray, row_length: int) -> Packing:
    """Best-fit decreasing; all lengths are between 1 and `row_length`."""
    count = len(lengths)
    if count and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise ValueError(f"windows of {lengths.min()} to {lengths.max()} slots, rows of {row_length}")
    order = np.argsort(-lengths, kind="stable")
    rows, offsets = [0] * count, [0] * count
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by free slots
    free = 0  # bit s is set when some row has exactly s free slots: the best fit is the lowest set bit from s on
    num_rows = 0
    for k, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, row = row_length, num_rows
            num_rows += 1
        rows[k], offsets[k] = row, row_length - room
        if room > length:
            with_room[room - length].append(row)
            free |= 1 << (room - length)
    row_of, offset_of = np.array(rows, np.int64), np.array(offsets, np.int64)
    return Packing(row_of, offset_of, _segments(row_of, offset_of), num_rows)


def one_per_row(count: int) -> Packing:
    """No packing: window k alone in row k."""
    zeros = np.zeros(count, np.int64)
    return Packing(np.arange(count), zeros, zeros + 1, count)


def _segments(row: np.ndarray, offset: np.ndarray) -> np.ndarray:
    order = np.lexsort((offset, row))
    sorted_row = row[order]
    first = np.searchsorted(sorted_row, sorted_row)  # where each row begins among the sorted windows
    segment = np.empty(len(row), np.int64)
    segment[order] = np.arange(len(row)) - first + 1
    return segment
