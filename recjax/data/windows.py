"""Which windows of an example are trained on: how a long history becomes pieces of bounded length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """The training windows of a set of examples: window k ends before event `end[k]` of example `example[k]`."""

    example: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.end)


def windows(lengths: np.ndarray, history_length: int, *, cut: str) -> Windows:
    """All windows of one epoch, in order of example. A window has at most `history_length` targets, at least one.

    "last": the newest window of each example. "chunk": consecutive windows from the newest backwards, so that every
    target counts once. "tile": as many, still every target once, but `tiles` moves the cuts between them each epoch.
    "random": one window per example, whose end `random_ends` draws anew for each epoch.
    Examples with fewer than two events have no window.
    """
    lengths = np.asarray(lengths, np.int64)
    targets = np.maximum(lengths - 1, 0)
    counts = -(-targets // history_length) if cut in ("chunk", "tile") else np.minimum(targets, 1)
    example = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    number = np.arange(len(example)) - first[example]
    return Windows(example, lengths[example] - number * history_length)


def random_ends(lengths: np.ndarray, history_length: int, draws: np.ndarray) -> np.ndarray:
    """The ends of windows of `history_length` targets (all of them where there are fewer); `draws` are uint64."""
    choices = np.maximum(lengths - history_length, 1).astype(np.uint64)
    return np.minimum(lengths, history_length + 1) + (draws % choices).astype(np.int64)


def tiles(
    lengths: np.ndarray, end: np.ndarray, history_length: int, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of windows of "tile" in place of those of "chunk", which end at `end`; `lengths` of their examples.

    An example of t targets has c = ceil(t / history_length) windows either way. The oldest takes p targets, the next
    ones `history_length` each and the newest the rest; p is any number that makes this work, chosen by `draws`
    (uint64, the same for all windows of an example). Each window starts with the last target of the one before it.
    """
    targets = lengths - 1
    count = -(-targets // history_length)
    least = targets - (count - 1) * history_length
    most = np.where(count > 1, history_length, targets)
    oldest = least + (draws % (most - least + 1).astype(np.uint64)).astype(np.int64)
    number = count - 1 - (lengths - end) // history_length
    start = np.where(number == 0, 0, oldest + (number - 1) * history_length)
    return start, np.minimum(oldest + 1 + number * history_length, lengths)


def window_start(end: np.ndarray, history_length: int) -> np.ndarray:
    """The first event of a window that ends before `end`; it is input only, the others are targets as well."""
    return np.maximum(end - history_length - 1, 0)
