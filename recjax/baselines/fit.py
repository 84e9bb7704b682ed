"""Baselines by name: fitted on the training split, their settings chosen on the validation split.

The test split takes no part in either. The same inputs give the same scorer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recjax.baselines import bm25, item_graph, item_knn
from recjax.baselines.harness import Scorer, choose
from recjax.baselines.popularity import Popularity
from recjax.baselines.recent_popularity import RecentPopularity
from recjax.baselines.records import Records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    """What baselines are made from: the splits, training events and validity of every row, and the protocol.

    `asked` are the records to be ranked, of which only what came before the targets may be used; `target_time` says
    that models are told when the target happens, `now` when a split holds out a period from one moment on. `titles` are
    those of the rows.
    """

    train: Records
    tuning: Records
    item_count: np.ndarray
    valid: np.ndarray
    remove_seen: bool = True
    seed: int = 0
    asked: Records | None = None
    target_time: bool = False
    now: int | None = None
    titles: Sequence[str | None] = ()

    def tuned(self, make: Callable[[Any], Scorer], grid: Sequence[Any]) -> Scorer:
        """The scorer of the best settings of `grid` on the tuning records."""
        return choose(make, grid, self.tuning, self.valid, remove_seen=self.remove_seen, seed=self.seed)


def _popularity(ground: Ground) -> Scorer:
    return Popularity(ground.item_count)


def _item_graph(ground: Ground) -> Scorer:
    grid = item_graph.grid()
    transitions = item_graph.Transitions(ground.train, len(ground.valid), max(s.steps for s in grid))
    return ground.tuned(lambda settings: item_graph.ItemGraph(transitions, settings), grid)


def _item_knn(ground: Ground) -> Scorer:
    grid = item_knn.grid()
    neighbours, shrinks = max(s.neighbours for s in grid), sorted({s.shrink for s in grid})
    lists = item_knn.neighbour_lists(ground.train, len(ground.valid), neighbours=neighbours, shrinks=shrinks)
    return ground.tuned(lambda settings: item_knn.ItemKnn(lists[settings.shrink], settings), grid)


def _recent_popularity(ground: Ground) -> Scorer:
    logs = [ground.train, ground.tuning, *([ground.asked] if ground.asked is not None else [])]
    return RecentPopularity(logs, len(ground.valid), target_time=ground.target_time, now=ground.now)


def _bm25(ground: Ground) -> Scorer:
    texts = {
        queries: bm25.documents(ground.train, ground.titles, len(ground.valid), queries=queries)
        for queries in (True, False)
    }
    return ground.tuned(lambda settings: bm25.TextMatch(texts[settings.queries], settings), bm25.grid())


BASELINES: dict[str, Callable[[Ground], Scorer]] = {
    "popularity": _popularity,
    "item_graph": _item_graph,
    "item_knn": _item_knn,
    "recent_popularity": _recent_popularity,
    "bm25": _bm25,
}
# These are left out where a task has no queries.
BY_TEXT = ("bm25",)
