"""Which share of the targets has been trained on, by the length of a user's history and the age of the target.

This is what a choice of windows costs in data: the newest window alone never reaches the older events of long
histories. Counted by planning the epochs, without reading an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recjax.data.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """`share[e, i, j]` of the `targets[i, j]` has been trained on at least once after `epochs[e]` epochs.

    Group i of users has at most `upto[i]` targets (and more than group i - 1). Group j of targets has fewer than
    `upto[j]` later events of the same user (and at least as many as group j - 1 may have). The last bound is the
    largest there is; where there are no targets the share is nan.
    """

    epochs: tuple[int, ...]
    upto: tuple[int, ...]
    targets: np.ndarray
    share: np.ndarray

    @property
    def total(self) -> list[float]:
        """The share of all targets after each of `epochs`."""
        return [float(np.nansum(s * self.targets) / self.targets.sum()) for s in self.share]

    def lines(self) -> list[str]:
        """A Markdown table of the last of `epochs`: a row for each group of users, a column for each age."""
        head = ["targets of the user", *(f"fewer than {n:,} later events" for n in self.upto), "all"]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for bound, counts, shares in zip(self.upto, self.targets, self.share[-1], strict=True):
            if counts.any():
                cells = [f"{s:.3f}" if n else "" for s, n in zip(shares, counts, strict=True)]
                whole = np.nansum(shares * counts) / counts.sum()
                lines.append(f"| at most {bound:,} | {' | '.join(cells)} | {whole:.3f} |")
        return lines


def coverage(stream: Stream, task: int, epochs: Sequence[int]) -> Coverage:
    """What the first epochs of a task train on; `epochs` are numbers of whole epochs, in rising order.

    The bounds of the groups are the length of a window times 1, 2, 4, ..., and the longest history.
    """
    lengths, limit = stream.lengths[task], stream.history_length
    upto = [limit]
    while upto[-1] < lengths.max() - 1:
        upto.append(upto[-1] * 2)
    upto[-1] = max(int(lengths.max()) - 1, limit)
    number = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    later = np.repeat(lengths, lengths) - 1 - number
    by_length = np.searchsorted(upto, np.repeat(lengths - 1, lengths))
    cell = by_length * len(upto) + np.searchsorted(upto, later, side="right")
    # A first event is input only, and users without two events are not trained on: neither has a target.
    is_target = number > 0
    targets = _count(cell[is_target], len(upto))
    seen, shares = np.zeros(len(number), bool), []
    for epoch in range(max(epochs)):
        seen |= stream.seen(task, epoch)
        if epoch + 1 in epochs:
            with np.errstate(invalid="ignore"):
                shares.append(_count(cell[is_target & seen], len(upto)) / targets)
    return Coverage(epochs=tuple(epochs), upto=tuple(upto), targets=targets, share=np.stack(shares))


def _count(cell: np.ndarray, groups: int) -> np.ndarray:
    return np.bincount(cell, minlength=groups**2).reshape(groups, groups)
