"""Planned windows copied into the rows of a batch, what the model may see beside what it has to predict.

The plan (`stream.Block`) knows indices and lengths; here are the items, the times, and which slots are hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recjax.data.batch import PAD, Batch
from recjax.data.hashing import hashed_with, mixed, uniform
from recjax.data.record import spans
from recjax.data.shards import ExampleSource
from recjax.data.stream import Block, thin
from recjax.data.teacher import Rankings
from recjax.data.vocab import OOV

_MASK = np.uint64(0x6D61736B)  # what a draw is for
TIME_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "history": ("history_time",),
    "target": ("history_time", "query_time"),
}


def empty(rows: int, row_length: int, *, times: str, masked: bool, listed: int = 0) -> Batch:
    """A training batch of padding; `times` is a key of `TIME_FIELDS`, `masked` says whether slots can be hidden.

    `listed` is how many items of a teacher's list come with each slot.
    """
    names = ("history_ids", "target_ids", "positions", "segment_ids", *(("masked",) if masked else ()))
    batch: Batch = {name: np.zeros((rows, row_length), np.int32) for name in names}
    batch["weight"] = np.zeros((rows, row_length), np.float32)
    if listed:
        batch["teacher/rows"] = np.zeros((rows, row_length, listed), np.int32)
        batch["teacher/distance"] = np.zeros((rows, row_length, listed), np.float32)
    return batch | {name: np.zeros((rows, row_length), np.int64) for name in TIME_FIELDS[times]}


def fill(
    batch: Batch,
    block: Block,
    rows: range,
    sources: Sequence[ExampleSource],
    *,
    mask_rate: float,
    has_loss: Sequence[bool],
    rankings: Sequence[Rankings] = (),
) -> None:
    """Copy these rows of the block into a batch of padding that was made for them; `sources[t]` are task t's examples.

    With `mask_rate` a slot shows the event to be predicted there, unless it is hidden. Where `has_loss[t]`, examples of
    task t have a list `loss`, and events with 0 there are no targets. `rankings[t]`, where there are any, are a
    teacher's lists for the events of task t.
    """
    kept = slice(int(block.bounds[rows.start]), int(block.bounds[rows.stop]))
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}
    row_length = batch["weight"].shape[1]
    names = ("items", "times") if "history_time" in batch else ("items",)
    for number, source in enumerate(sources):
        mine = kept if len(sources) == 1 else kept.start + np.flatnonzero(block.task[kept] == number)
        example, length, skip = block.example[mine], block.length[mine], block.skip[mine]
        if not len(example):
            continue
        found = source.read(example, (*names, "loss") if has_loss[number] else names)
        items, begins = found["items"]
        place = spans(np.zeros_like(length), length)  # inside the window
        to = place + np.repeat((block.row[mine] - rows.start) * row_length + block.offset[mine], length)
        shown = place + np.repeat(begins + block.start[mine], length)
        asked = shown + 1
        if block.thinned[mine].any():
            _thin(block, mine, source.lengths[example] + (mask_rate > 0), begins, shown, asked)
        is_target = place >= np.repeat(skip, length) if skip.any() else True
        if mask_rate:
            shown = asked = asked - 1
            event = asked - np.repeat(begins, length)
            is_target &= _hidden(block.draw[mine], length, event, is_target, mask_rate)
            flat["masked"][to] = is_target
            flat["history_ids"][to] = np.where(is_target, PAD, items[shown])
        else:
            flat["history_ids"][to] = items[shown]
        targets = items[asked]
        is_target &= targets != OOV
        if has_loss[number]:
            is_target &= found["loss"][0][asked] > 0
        flat["target_ids"][to] = np.where(is_target, targets, PAD)
        flat["weight"][to] = is_target
        flat["positions"][to] = place
        flat["segment_ids"][to] = np.repeat(block.segment[mine], length)
        if rankings:
            event = asked - np.repeat(begins - rankings[number].first[example], length)
            flat["teacher/rows"][to] = rankings[number].rows[event]
            flat["teacher/distance"][to] = rankings[number].distance[event]
        for name, at in (("history_time", shown), ("query_time", asked)):
            if name in flat:
                flat[name][to] = found["times"][0][at]


def _hidden(
    draw: np.ndarray, length: np.ndarray, event: np.ndarray, allowed: np.ndarray | bool, rate: float
) -> np.ndarray:
    """bool per slot: whether a window's draw hides this event; of each window at least the one with the least hash."""
    drawn = hashed_with(np.repeat(mixed(draw ^ _MASK), length), event)
    drawn = np.where(allowed, drawn, np.iinfo(np.uint64).max)
    least = np.repeat(np.minimum.reduceat(drawn, np.cumsum(length) - length), length)
    return (uniform(drawn) < rate) | (drawn == least)


def _thin(
    block: Block,
    mine: slice | np.ndarray,
    lengths: np.ndarray,
    begins: np.ndarray,
    sources: np.ndarray,
    targets: np.ndarray,
) -> None:
    """Put the events of thinned windows in place of the consecutive ones that `sources` and `targets` point at."""
    thinned = np.flatnonzero(block.thinned[mine])
    length = block.length[mine]
    count = int(length[thinned[0]]) + 1
    events = thin(block.draw[mine][thinned], lengths[thinned].astype(np.int64), count)
    events = events + begins[thinned][:, None]
    at = (np.cumsum(length) - length)[thinned][:, None] + np.arange(count - 1)
    sources[at], targets[at] = events[:, :-1], events[:, 1:]
