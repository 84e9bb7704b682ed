"""A simulated world of plain categories: rows of a few columns and a label, as public sets for click models are.

Every value has a weight of its own, and each two columns an inner product of hidden vectors of their values, so that a
model needs crosses of columns to come near the best. Rows come with a column split: 7 to 2 to 1, as in Frappe_x1.
Arithmetic is on whole numbers and on sums, quotients and square roots, which are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from recjax.core.errors import ConfigError
from recjax.data.directory import write_directory
from recjax.data.draws import Stream, power
from recjax.data.small_world import SPLITS, VERSION, SmallWorld, check_limits
from recjax.data.tables import Tables

_WIDTH, _REACH = 4, 7  # hidden factors, whole numbers from -7 to 7
_CHANCES = 2**16


@dataclass(frozen=True, kw_only=True)
class CategoryWorld(SmallWorld):
    """`rows` with the columns `names`, the k-th of `sizes[k]` values, and a `label` of 0 or 1.

    Values are skewed: the k-th of a column is drawn in proportion to 1 / sqrt(k + 1). `noise` makes chances flatter.
    """

    names: Sequence[str] = ("user_id", "item_id", "tag_id")
    sizes: Sequence[int] = (300, 500, 200)
    rows: int = 30_000
    noise: float = 0.5
    kind: ClassVar[str] = "categories"

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        check_limits(self, rows=(100, 10**8), noise=(0.01, 100))
        if len(self.names) != len(self.sizes) or len(self.names) < 2 or min(self.sizes) < 1:
            raise ConfigError(
                f"CategoryWorld.names = {self.names}, sizes = {self.sizes}",
                expected="at least two columns, and a number of values for each",
            )

    def frame(self) -> tuple[pl.DataFrame, np.ndarray]:
        """The rows, and the chance of a 1 of each, in 65536ths."""
        score = np.zeros(self.rows)
        vectors, columns = [], {}
        for at, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            weight = np.floor(1000 * power(np.arange(1, size + 1), -8)).astype(np.int64) + 1
            reach = np.cumsum(weight)
            value = np.searchsorted(reach, Stream(self.seed, 301 + at).below(int(reach[-1]), self.rows), side="right")
            columns[name] = value + 1
            score += (Stream(self.seed, 401 + at).below(201, size) - 100)[value] / 150.0
            hidden = Stream(self.seed, 501 + at).below(2 * _REACH + 1, size * _WIDTH).reshape(size, _WIDTH) - _REACH
            vectors.append(hidden[value])
        for a in range(len(vectors)):
            for b in range(a + 1, len(vectors)):
                score += (vectors[a] * vectors[b]).sum(1) / (40.0 * len(vectors))
        sharp = (score - 0.4) / self.noise
        chance = np.floor(_CHANCES * (0.5 + 0.5 * sharp / np.sqrt(1 + sharp * sharp))).astype(np.int64)
        label = (Stream(self.seed, 302 + len(vectors)).below(_CHANCES, self.rows) < chance).astype(np.int64)
        part = np.searchsorted([7, 9], Stream(self.seed, 601).below(10, self.rows), side="right")
        return pl.DataFrame({"label": label, **columns}).with_columns(split=pl.Series(SPLITS).gather(part)), chance

    def tables(self) -> Tables:
        """The rows as a log without users, items or times; a note says the share of positives."""
        frame, chance = self.frame()
        note = f"positives {frame['label'].mean():.4f}, expected {chance.mean() / _CHANCES:.4f}"
        return Tables(
            interactions=frame,
            simulated=True,
            notes=(f"simulated world {self.kind} (seed {self.seed}); {note}",),
        )

    def write(self, path: str | Path) -> Path:
        """Write a data directory, which must not exist."""
        marker: dict[str, Any] = {"simulated": True, "kind": self.kind, "version": VERSION, "world": asdict(self)}
        return write_directory(path, {"interactions": self.frame()[0]}, simulated={**marker, "hash": self.hash})
