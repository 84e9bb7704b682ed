"""Item neighbours: items that the same users had, by a shrunken cosine.

    similarity(i, j) = users(i and j) / (sqrt(users(i) * users(j)) + shrink),  similarity(i, i) = 0
and a user's score for j is the sum over the history, latest first with weight `history_decay ** age`, of the
similarity, where every item keeps its `neighbours` most similar items only (Deshpande & Karypis 2004, item-based
top-N). A user counts once per item, and with at most the latest `MAX_EVENTS` events, which bounds the work by
users * MAX_EVENTS ** 2. Co-occurrence is computed for a block of items at a time, so memory is that of the neighbour
lists. Order within a history matters by the decay alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from recjax.baselines.records import Records

MAX_EVENTS = 500
_BLOCK_CELLS = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """See the formula above; `shrink` and `history_decay` are chosen on the validation split from `grid`."""

    neighbours: int = 200
    shrink: float = 0.0
    history_decay: float = 1.0


def grid() -> list[KnnSettings]:
    """The settings that are tried."""
    tried = itertools.product((0.0, 10.0), (0.4, 0.6, 0.8, 1.0))
    return [KnnSettings(shrink=shrink, history_decay=decay) for shrink, decay in tried]


def neighbour_lists(
    train: Records, num_rows: int, *, neighbours: int, shrinks: Sequence[float]
) -> dict[float, sparse.csr_array]:
    """For every shrinkage the similarities [v, v] with at most `neighbours` entries per row, in one pass."""
    train = train.latest(MAX_EVENTS)
    user = np.repeat(np.arange(len(train)), train.lengths)
    events = sparse.csr_array((np.ones(len(user), np.float32), (user, train.items)), shape=(len(train), num_rows))
    events.data[:] = 1.0  # repeats were added up
    by_item = sparse.csr_array(events.T)
    norm = np.sqrt(np.diff(by_item.indptr)).astype(np.float32)
    kept: dict[float, list[sparse.csr_array]] = {shrink: [] for shrink in shrinks}
    step = max(1, _BLOCK_CELLS // num_rows)
    for start in range(0, num_rows, step):
        together = sparse.csr_array(by_item[start : start + step] @ events)
        together.sort_indices()
        row = start + np.repeat(np.arange(len(together.indptr) - 1), np.diff(together.indptr))
        together.data[row == together.indices] = 0.0
        cosine = norm[row] * norm[together.indices]
        for shrink, parts in kept.items():
            similarity = together.data / (cosine + np.float32(shrink))
            whole = sparse.csr_array((similarity, together.indices, together.indptr), shape=together.shape)
            parts.append(_strongest(whole, neighbours))
    return {shrink: sparse.csr_array(sparse.vstack(parts)) for shrink, parts in kept.items()}


class ItemKnn:
    """Scores from the neighbour lists of one shrinkage."""

    def __init__(self, similarity: sparse.csr_array, settings: KnnSettings) -> None:
        self._similarity, self._settings = similarity, settings

    @property
    def settings(self) -> dict[str, float]:
        """What was chosen."""
        return dataclasses.asdict(self._settings)

    def scores(self, records: Records) -> np.ndarray:
        """float32 [n, v]."""
        weights = records.weights(
            len(self._similarity.indptr) - 1, limit=MAX_EVENTS, decay=self._settings.history_decay
        )
        return sparse.csr_array(weights @ self._similarity).toarray()


def _strongest(matrix: sparse.csr_array, keep: int) -> sparse.csr_array:
    """The `keep` largest entries above 0 of every row; among equals the lower columns. Indices must be sorted."""
    chosen = []
    for start, stop in itertools.pairwise(matrix.indptr):
        row = matrix.data[start:stop]
        if stop - start > keep:
            bound = np.partition(row, len(row) - keep)[len(row) - keep]
            above, equal = np.flatnonzero(row > bound), np.flatnonzero(row == bound)
            inside = np.sort(np.concatenate([above, equal[: keep - len(above)]]))
        else:
            inside = np.arange(len(row))
        chosen.append(start + inside[row[inside] > 0])
    lengths = np.fromiter(map(len, chosen), np.int64, len(chosen))
    at = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return sparse.csr_array((matrix.data[at], matrix.indices[at], indptr), shape=matrix.shape)
