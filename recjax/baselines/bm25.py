"""BM25: the items whose words match those of the query, for tasks with text.

The text of an item is its title or, where that is better on the validation split, its title and all queries that it
answers in training, each as often as it does. Items without a match are in order of their rows, the most popular first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from recjax.baselines.records import Records
from recjax.core.errors import ConfigError
from recjax.index.bm25 import Bm25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bm25Settings:
    """See `recjax.index.bm25` for `k1` and `b`; `queries` adds those of the training split to the titles."""

    k1: float = 1.2
    b: float = 0.75
    queries: bool = True


def grid() -> list[Bm25Settings]:
    """The settings that are tried."""
    tried = itertools.product((True, False), (1.2, 2.0), (0.4, 0.75))
    return [Bm25Settings(k1=k1, b=b, queries=queries) for queries, k1, b in tried]


def documents(train: Records, titles: Sequence[str | None], num_rows: int, *, queries: bool) -> list[str]:
    """The text of every row. Raises `ConfigError` for records without text."""
    if train.text is None:
        raise ConfigError("the baseline bm25 needs queries", where="Evaluation.baselines", expected="a task with text")
    parts: list[list[str]] = [[title] if title else [] for title in titles] or [[] for _ in range(num_rows)]
    if queries:
        of_item = np.repeat(train.text, train.lengths)
        for row, text in zip(train.items.tolist(), of_item.tolist(), strict=True):
            parts[row].append(text)
    return [" ".join(part) for part in parts]


class TextMatch:
    """Scores of the items' texts for the query of each record."""

    def __init__(self, texts: Sequence[str], settings: Bm25Settings) -> None:
        self._index, self._settings = Bm25(texts, k1=settings.k1, b=settings.b), settings

    @property
    def settings(self) -> dict[str, float]:
        """What was chosen; `queries` is 1 where training queries are part of the text."""
        return {name: float(value) for name, value in dataclasses.asdict(self._settings).items()}

    def scores(self, records: Records) -> np.ndarray:
        """float32 [n, v]."""
        return self._index.scores([] if records.text is None else records.text.tolist())
