"""Positives that are hidden from training, as when conversions cannot be attributed: for experiments on lost signal.

Whether the label of a row is hidden depends on the seed and the number of the row alone, so that every epoch, batch
size and arm of an experiment loses the same ones. Nothing is hidden from an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.batch import Batch
from recjax.data.hashing import hashed_with, hashes, uniform

_HIDDEN = 0x68696465  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class HiddenPositives:
    """Of the labels of `head` that are above 0 a `share` becomes 0; with `domains`, only in these."""

    head: str
    share: float
    domains: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))
        if not 0 <= self.share <= 1:
            raise ConfigError(f"HiddenPositives.share = {self.share}", expected="from 0 to 1")

    def apply(self, batch: Batch, rows: np.ndarray) -> Batch:
        """The batch of the rows of these numbers with some labels hidden; `ConfigError` without such a head."""
        name = f"label/{self.head}"
        if name not in batch:
            raise ConfigError(f"there are no labels {self.head!r}", where="HiddenPositives.head")
        label, drawn = batch[name], uniform(hashed_with(np.repeat(hashes(1, self.seed, _HIDDEN), len(rows)), rows))
        lost = (label > 0) & (drawn < self.share)
        if self.domains:
            lost &= np.isin(batch["domain"], self.domains)
        return {**batch, name: np.where(lost, np.float32(0), label)}
