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
    target counts once. "random": one window per example, whose end `random_ends` draws anew for each epoch.
    Examples with fewer than two events have no window.
    """
    lengths = np.asarray(lengths, np.int64)
    targets = np.maximum(lengths - 1, 0)
    counts = -(-targets // history_length) if cut == "chunk" else np.minimum(targets, 1)
    example = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    number = np.arange(len(example)) - first[example]
    return Windows(example, lengths[example] - number * history_length)


def random_ends(lengths: np.ndarray, history_length: int, draws: np.ndarray) -> np.ndarray:
    """The ends of windows of `history_length` targets (all of them where there are fewer); `draws` are uint64."""
    choices = np.maximum(lengths - history_length, 1).astype(np.uint64)
    return np.minimum(lengths, history_length + 1) + (draws % choices).astype(np.int64)


def window_start(end: np.ndarray, history_length: int) -> np.ndarray:
    """The first event of a window that ends before `end`; it is input only, the others are targets as well."""
    return np.maximum(end - history_length - 1, 0)
