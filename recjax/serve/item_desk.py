"""Recommending and searching for a server: histories and queries share calls, with and without filters.

Batches are filled up to powers of two and seen items to one of two widths, so that only a handful of shapes is ever
compiled, all of them by `warm_up`; batches in which someone filters take one of two sizes. Rows do not influence one
another, so an answer does not depend on its company.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recjax.serve.bundle import Bundle
from recjax.serve.desk import Desk
from recjax.serve.features import Encoded, pad, pad_times
from recjax.serve.request import MAX_HISTORY

SEEN = 256  # seen items of most requests; more of them take the widest shape, in two batch sizes only


class Wanted(NamedTuple):
    """A request; `allowed` bool [rows] are the items that may come out, all when None."""

    encoded: Encoded
    exclude_seen: bool = True
    allowed: np.ndarray | None = None


class Found(NamedTuple):
    """Scores and rows of one request, `max_k` of each, best first."""

    scores: np.ndarray
    rows: np.ndarray


class ItemDesk(Desk[Bundle, Wanted, Found]):
    """The queue in front of one bundle that recommends or searches."""

    def __init__(self, bundle: Bundle, *, max_batch: int = 32, max_wait: float = 0.002, **bounds: Any) -> None:
        """`max_batch` is rounded up to a power of two; the other `bounds` are those of `Desk`."""
        self._max_batch = power_of_two(max_batch)
        super().__init__(bundle, room=self._max_batch, max_wait=max_wait, **bounds)

    def answers(self, asked: Sequence[Wanted]) -> list[Found]:
        """The best items for each."""
        seen = [one.encoded.seen_ids if one.exclude_seen else one.encoded.seen_ids[:0] for one in asked]
        filtered = any(one.allowed is not None for one in asked)
        count, width = self._shape(len(asked), max(len(ids) for ids in seen), filtered)
        length = self.bundle.prompt_length
        scores, rows = self.bundle.recommend(
            pad([one.encoded.history_ids for one in asked], count=count, width=length),
            pad(seen, count=count, width=width),
            *pad_times([one.encoded for one in asked], self.bundle.times, count=count, width=length),
            **({"allowed": self._allowed(asked, count)} if filtered else {}),
        )
        return [Found(scores[i], rows[i]) for i in range(len(asked))]

    def warm_up(self) -> int:
        """As `Desk`."""
        each = itertools.product(range(1, self._max_batch + 1), (SEEN, MAX_HISTORY), {False, self.bundle.filters})
        shapes = {(*self._shape(count, seen, filtered), filtered) for count, seen, filtered in each}
        for count, width, filtered in sorted(shapes):
            length = self.bundle.prompt_length
            times = pad_times([], self.bundle.times, count=count, width=length)
            some = {"allowed": np.ones((count, self.bundle.vocab.num_rows), bool)} if filtered else {}
            history, seen = pad([], count=count, width=length), pad([], count=count, width=width)
            self.bundle.recommend(history, seen, *times, **some)
        return len(shapes)

    def _allowed(self, asked: Sequence[Wanted], count: int) -> np.ndarray:
        """bool [count, rows]: the items that may come out for each request."""
        allowed = np.ones((count, self.bundle.vocab.num_rows), bool)
        for i, one in enumerate(asked):
            if one.allowed is not None:
                allowed[i] = one.allowed
        return allowed

    def _shape(self, count: int, seen: int, filtered: bool) -> tuple[int, int]:
        """Batch rows and width of the seen items for `count` requests with at most `seen` each."""
        few = 1 if count == 1 else self._max_batch
        if seen <= SEEN:
            return few if filtered else power_of_two(count), SEEN
        return few, MAX_HISTORY


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
