"""Planned windows copied into the rows of a batch, what the model may see beside what it has to predict.

The plan (`stream.Block`) knows indices and lengths; here are the items, the times, and which slots are hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

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


class Beside(NamedTuple):
    """The lists beside the events of each task's examples, "loss" or "branch", and the most branches of any example."""

    lists: Sequence[Collection[str]]
    branches: int = 0


def empty(rows: int, row_length: int, *, times: str, masked: bool, branches: bool = False, listed: int = 0) -> Batch:
    """A training batch of padding; `times` is a key of `TIME_FIELDS`, `masked` says whether slots can be hidden.

    `branches` says whether examples have any, `listed` how many items of a teacher's list come with each slot.
    """
    names = ["history_ids", "target_ids", "positions", "segment_ids"]
    names += [name for name, is_there in (("masked", masked), ("parents", branches)) if is_there]
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
    beside: Beside,
    rankings: Sequence[Rankings] = (),
) -> None:
    """Copy these rows of the block into a batch of padding that was made for them; `sources[t]` are task t's examples.

    With `mask_rate` a slot shows the event to be predicted there, unless it is hidden. Events with 0 in `loss` are no
    targets. Those with k > 0 in `branch` are of the example's branch k: a segment that sees the events with 0, its
    parent, but not the other branches, and goes on where the parent ends. `rankings[t]`, where there are any, are a
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
        found = source.read(example, (*names, *beside.lists[number]))
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
        if "loss" in beside.lists[number]:
            is_target &= found["loss"][0][asked] > 0
        flat["target_ids"][to] = np.where(is_target, targets, PAD)
        flat["weight"][to] = is_target
        segment = np.repeat((block.segment[mine] - 1) * (beside.branches + 1) + 1, length)
        if "branch" in beside.lists[number]:
            branch = found["branch"][0][shown]
            flat["positions"][to] = _resumed(place, branch)
            flat["segment_ids"][to] = segment + branch
            flat["parents"][to] = np.where(branch > 0, segment, PAD)
        else:
            flat["positions"][to], flat["segment_ids"][to] = place, segment
        if rankings:
            event = asked - np.repeat(begins - rankings[number].first[example], length)
            flat["teacher/rows"][to] = rankings[number].rows[event]
            flat["teacher/distance"][to] = rankings[number].distance[event]
        for name, at in (("history_time", shown), ("query_time", asked)):
            if name in flat:
                flat[name][to] = found["times"][0][at]


def _resumed(place: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """Positions of slots, window after window, whose branches 0, 1, 2, ... stand one behind the other.

    Each branch goes on where branch 0 of its window ends; `place` counts from the first slot of a window.
    """
    slot = np.arange(len(place))
    is_first = (place == 0) | (branch != np.roll(branch, 1))
    begin = np.maximum.accumulate(np.where(is_first, slot, 0))
    fork = np.maximum.accumulate(np.where(is_first & (branch == 1), slot, 0))
    return np.where(branch > 0, place[fork] + slot - begin, place)


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
