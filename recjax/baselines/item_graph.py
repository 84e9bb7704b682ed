"""Item transition graph: what usually follows the last few items, counted, not trained.

An edge i -> j weighs how often j came s events after i, summed over s = 1..steps with weight `step_decay ** (s - 1)`.
A user's score for j is the sum over the last `last` items i (age a = 0 for the latest) of
    history_decay ** a * edge(i, j) / (count(i) * count(j) ** popularity)
where count is the number of training events. With steps = last = 1 and popularity = 0 this is the order of plain
first-order transition counts. That such a graph rivals trained models on common benchmarks is the finding of Han et
al. 2026 (arXiv 2605.07125), whose heuristic walks the graph from the last one or two items; theirs adds text
similarity between items, which is left out here. Items that nothing leads to keep score 0 and so come last, by row,
which is by popularity.

Memory is that of the distinct pairs: at most steps * events entries; beyond `MAX_EDGES` the lightest go.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from scipy import sparse

from recjax.baselines.records import Records

MAX_EDGES = 60_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """See the formula above; all are chosen on the validation split from `grid`."""

    steps: int = 1
    step_decay: float = 0.5
    last: int = 1
    history_decay: float = 0.5
    popularity: float = 0.0


def grid() -> list[GraphSettings]:
    """The settings that are tried: plain first-order counts, and four that look ten steps around."""
    reach = itertools.product((0.5, 0.8), (0.0, 0.25))
    return [GraphSettings()] + [
        GraphSettings(steps=10, last=10, step_decay=0.8, history_decay=decay, popularity=popularity)
        for decay, popularity in reach
    ]


class Transitions:
    """Transition counts of the training split, one matrix per distance, from which every graph is put together."""

    def __init__(self, train: Records, num_rows: int, max_steps: int) -> None:
        self.count = np.maximum(np.bincount(train.items, minlength=num_rows), 1).astype(np.float32)
        user = np.repeat(np.arange(len(train)), train.lengths)
        self.at_distance: list[sparse.csr_array] = []
        for step in range(1, max_steps + 1):
            same = user[step:] == user[:-step]
            source, target = train.items[:-step][same], train.items[step:][same]
            pairs = (np.ones(len(source), np.float32), (source, target))
            self.at_distance.append(sparse.csr_array(pairs, shape=(num_rows, num_rows)))

    def graph(self, settings: GraphSettings) -> sparse.csr_array:
        """Edge weights divided by the popularity of both ends."""
        total = self.at_distance[0].copy()
        for step, counts in enumerate(self.at_distance[1 : settings.steps], start=1):
            total = total + counts * np.float32(settings.step_decay**step)
            if total.nnz > MAX_EDGES:
                total = _heaviest(total, MAX_EDGES)
        total = sparse.csr_array(total)
        source = np.repeat(np.arange(len(self.count)), np.diff(total.indptr))
        target_weight = self.count ** np.float32(settings.popularity)
        total.data = (total.data / (self.count[source] * target_weight[total.indices])).astype(np.float32)
        return total


class ItemGraph:
    """Scores from the graph of `settings`."""

    def __init__(self, transitions: Transitions, settings: GraphSettings) -> None:
        self._graph = transitions.graph(settings)
        self._num_rows = len(transitions.count)
        self._settings = settings

    @property
    def settings(self) -> dict[str, float]:
        """What was chosen."""
        return dataclasses.asdict(self._settings)

    def scores(self, records: Records) -> np.ndarray:
        """float32 [n, v]."""
        chosen = self._settings
        weights = records.weights(self._num_rows, limit=chosen.last, decay=chosen.history_decay)
        return sparse.csr_array(weights @ self._graph).toarray()


def _heaviest(matrix: sparse.csr_array, keep: int) -> sparse.csr_array:
    """The `keep` largest entries, more where the last one has equals."""
    bound = np.partition(matrix.data, matrix.nnz - keep)[matrix.nnz - keep]
    matrix.data[matrix.data < bound] = 0
    matrix.eliminate_zeros()
    return matrix
