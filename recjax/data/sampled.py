"""Examples to be read again and again: splits decoded once, held-out splits cut to a fixed sample of users.

Evaluating every so many steps of training reads the same split each time, and often a part of its users is enough.
The sample depends on its size and seed alone, so two runs are measured on the same users.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from recjax.data.examples import MEMORY_BYTES, Examples
from recjax.data.shards import ExampleSource


@dataclasses.dataclass(frozen=True)
class HeldExamples(Examples):
    """Examples whose splits are decoded once; held-out splits hold at most `max_users`, drawn by `seed`."""

    max_users: int | None
    seed: int

    def source(self, split: str, *, memory_bytes: int = MEMORY_BYTES) -> ExampleSource:
        if split not in self._sources:
            source = super().source(split, memory_bytes=memory_bytes)
            if split != "train" and self.max_users is not None and len(source) > self.max_users:
                source = _Sample(source, self.max_users, self.seed)
            self._sources[split] = source
        return self._sources[split]

    @functools.cached_property
    def _sources(self) -> dict[str, ExampleSource]:
        return {}


class _Sample:
    """Some examples of a source, in its order."""

    def __init__(self, source: ExampleSource, size: int, seed: int) -> None:
        self._source = source
        self._indices = np.sort(np.random.default_rng(seed).choice(len(source), size, replace=False))
        self.lengths = source.lengths[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        return self._source[self._indices[index]]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> Sequence[dict[str, np.ndarray]]:
        return [self[i] for i in indices]

    def read(self, indices: np.ndarray, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return self._source.read(self._indices[indices], names)
