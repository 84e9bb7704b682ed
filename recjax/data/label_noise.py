"""What is taken from training, for experiments: positives that are hidden, rows that a biased teacher never saw.

Whether a row is concerned depends on the seed and the number of the row alone, so that every epoch, batch size and arm
of an experiment loses the same ones. Nothing is taken from an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.batch import Batch
from recjax.data.hashing import hashed_with, hashes, uniform

_HIDDEN, _LEFT_OUT = 0x68696465, 0x6C656674  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class HiddenPositives:
    """Of the labels of `head` that are above 0 a `share` becomes 0; with `domains`, only in these.

    As when conversions cannot be attributed.
    """

    head: str
    share: float
    domains: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))
        _check_share(self)

    def apply(self, batch: Batch, rows: np.ndarray) -> Batch:
        """The batch of the rows of these numbers with some labels hidden; `ConfigError` without such a head."""
        label = _label(batch, self)
        lost = (label > 0) & _drawn(self.seed, _HIDDEN, rows, self.share)
        if self.domains:
            lost &= np.isin(batch["domain"], self.domains)
        return {**batch, f"label/{self.head}": np.where(lost, np.float32(0), label)}


@dataclass(frozen=True, kw_only=True)
class MissingNegatives:
    """A `share` of the rows whose label of `head` is below a half counts nothing, in no loss.

    A model that never saw them says too much: the bias that is injected into a teacher (Khani et al. 2024).
    """

    head: str
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_share(self)

    def apply(self, batch: Batch, rows: np.ndarray, count: int) -> Batch:
        """The batch of the rows of these numbers out of `count`; `ConfigError` without such a head."""
        label = _label(batch, self)
        lost = (label >= 0) & (label < 0.5) & _drawn(self.seed, _LEFT_OUT, rows, self.share)
        return {**batch, "weight": np.where(lost, np.float32(0), batch["weight"])}


@dataclass(frozen=True, kw_only=True)
class MissingPeriod:
    """The last `share` of the rows, which are in order of time, counts nothing: what was learned is out of date."""

    share: float = 0.5

    def __post_init__(self) -> None:
        _check_share(self)

    def apply(self, batch: Batch, rows: np.ndarray, count: int) -> Batch:
        """The batch of the rows of these numbers out of `count`."""
        return {**batch, "weight": np.where(rows < (1 - self.share) * count, batch["weight"], np.float32(0))}


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What is known of `head` as totals alone: every row has the rate of its domain in the training split.

    As `label/<name>`, to which nothing that is hidden is hidden: an aggregate source beside labels that are lost
    (`losses.head_distillation.GroupCalibration`).
    """

    head: str
    name: str = "total"

    def rates(self, label: np.ndarray, domain: np.ndarray) -> np.ndarray:
        """float32 [domains]: the mean of the labels [n] of each domain that are known, -1 where none is."""
        known = label >= 0
        many = np.bincount(domain[known], minlength=int(domain.max(initial=0)) + 1)
        rate = np.bincount(domain[known], label[known], minlength=len(many)) / np.maximum(many, 1)
        return np.where(many > 0, rate, -1).astype(np.float32)


def _check_share(noise: HiddenPositives | MissingNegatives | MissingPeriod) -> None:
    if not 0 <= noise.share <= 1:
        raise ConfigError(f"{type(noise).__name__}.share = {noise.share}", expected="from 0 to 1")


def _label(batch: Batch, noise: HiddenPositives | MissingNegatives) -> np.ndarray:
    if f"label/{noise.head}" not in batch:
        raise ConfigError(f"there are no labels {noise.head!r}", where=f"{type(noise).__name__}.head")
    return batch[f"label/{noise.head}"]


def _drawn(seed: int, purpose: int, rows: np.ndarray, share: float) -> np.ndarray:
    """bool [n]: a share of the rows, by their numbers."""
    return uniform(hashed_with(np.repeat(hashes(1, seed, purpose), len(rows)), rows)) < share
