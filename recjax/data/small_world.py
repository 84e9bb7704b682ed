"""What the small worlds of `worlds.py` share: the tables that come of what they draw, and what is said about them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from recjax.core.errors import ConfigError
from recjax.data import lexicon
from recjax.data.directory import write_directory
from recjax.data.draws import Stream
from recjax.data.tables import Tables

VERSION = 1
START = 1_577_836_800  # 2020-01-01 UTC
SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)


@dataclass(frozen=True)
class Made:
    """Events (`user`, `item`, `part` of `SPLITS`), user after user and oldest first, and pairs (`query`, `answer`,
    `asked`: their part) of queries, whose `texts` they are."""

    user: np.ndarray
    item: np.ndarray
    part: np.ndarray
    texts: list[str]
    query: np.ndarray
    answer: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SmallWorld:
    """What the worlds share: their tables, and what is said about them."""

    items: int = 1000
    seed: int = 0
    kind: ClassVar[str] = ""

    def make(self) -> Made:
        """Draw the events and pairs."""
        raise NotImplementedError(type(self).__name__)

    def measured(self, made: Made) -> dict[str, Any]:
        """The value that the knob has in what was made."""
        raise NotImplementedError(type(self).__name__)

    @property
    def hash(self) -> str:
        """SHA-256 of the settings and the version."""
        return hashlib.sha256(f"recjax.{self.kind}/{VERSION} {sorted(asdict(self).items())}".encode()).hexdigest()

    def tables(self) -> Tables:
        """All tables, as `DataDir.load` would give them; a note says what was measured."""
        return self._tables(self.make())

    def write(self, path: str | Path) -> Path:
        """Write a data directory, which must not exist; its `simulated.json` has the settings and what was measured."""
        made = self.make()
        tables = self._tables(made)
        frames = {n: getattr(tables, n) for n in ("items", "queries", "relevance")}
        marker = {"simulated": True, "kind": self.kind, "version": VERSION, "world": asdict(self), "hash": self.hash}
        marker["measured"] = self.measured(made)
        return write_directory(path, {"interactions": tables.interactions.drop("order"), **frames}, simulated=marker)

    def _tables(self, made: Made) -> Tables:
        ids = Stream(self.seed, 100).order(self.items) + 1
        names = pl.Series(SPLITS)
        log = {"user_id": made.user + 1, "item_id": ids[made.item], "timestamp": START + 60 * np.arange(len(made.user))}
        judged = {"query_id": made.query + 1, "item_id": ids[made.answer], "label": np.ones(len(made.query), np.int64)}
        titles = [lexicon.name(lexicon.MAX_NAMES - 1 - k) for k in range(self.items)]
        values = ", ".join(f"{name} {value}" for name, value in self.measured(made).items())
        interactions = pl.DataFrame(log).with_columns(split=names.gather(made.part))
        return Tables(
            interactions=interactions.with_columns(order=pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")),
            items=pl.DataFrame({"item_id": ids, "title": titles}).sort("item_id"),
            queries=pl.DataFrame({"query_id": np.arange(1, len(made.texts) + 1), "text": made.texts}),
            relevance=pl.DataFrame(judged).with_columns(split=names.gather(made.asked)),
            simulated=True,
            notes=(f"simulated world {self.kind} (seed {self.seed}); measured: {values}",),
        )


def check_limits(world: Any, **limits: tuple[float, float]) -> None:
    """Raise `ConfigError` for a setting outside of its limits."""
    for name, (low, high) in limits.items():
        if not low <= getattr(world, name) <= high:
            where = f"{type(world).__name__}.{name} = {getattr(world, name)}"
            raise ConfigError(f"{where} makes no world", expected=f"between {low} and {high}")
