"""The simulated world: the data of the quickstart, the tests and every recipe that is run without DATA_DIR.

One seed gives the same tables, byte for byte, on every machine. Whatever comes from here says that it is simulated.
It stands in for real data only in shape: a log with sessions, tastes, drifting popularity and a long tail, and items
and queries in words. See `simulate_log.py` for the laws.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from recjax.core.errors import ConfigError
from recjax.data import lexicon
from recjax.data.directory import write_directory
from recjax.data.simulate_catalogue import item_ids, make_items, make_queries, make_users, make_vectors
from recjax.data.simulate_log import (
    PARTS,
    Chances,
    Laws,
    Log,
    history_lengths,
    make_laws,
    make_log,
    make_ratings,
    user_ids,
)
from recjax.data.tables import TIE_RULE, Tables

VERSION = 1  # of the laws: a change of what a seed gives is a new number
START = 1_577_836_800  # 2020-01-01 UTC, when the year of the log begins


@dataclass(frozen=True, kw_only=True)
class World:
    """A simulated world. Only `num_events` and `seed` need choosing; None means a size that fits the events.

    Probabilities are rounded to 256ths and `zipf` to sixteenths. Raises `ConfigError` for sizes or probabilities
    that make no world.
    """

    num_events: int = 20_000
    num_users: int | None = None  # events / 20
    num_items: int | None = None  # 7 * sqrt(events)
    num_genres: int | None = None  # sqrt(items) / 4, between 4 and 32
    num_moods: int = 6
    latent_width: int = 8
    zipf: float = 0.75  # exponent of popularity
    fade_days: int = 180  # half-life of interest in an item after its birth
    session_length: float = 5.0  # events, on average
    stay: float = 0.5  # inside a session: the genre stays,
    step: float = 0.1875  # or moves on to its neighbour, else the user's taste decides
    follow: float = 0.5  # the mood follows from that of the last item,
    recall: float = 0.25  # or from that of the item before the last,
    habit: float = 0.125  # or is one of the user's own, else any
    stray: float = 0.0625  # any item, by popularity
    searches: bool = False  # half of the sessions open with a query (column query_id)
    ratings: bool = False  # every event has one, by the user's taste (column rating, 1 to 5)
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "num_events": (1, 10**8),
            "num_users": (1, self.num_events),
            "num_items": (1, lexicon.MAX_NAMES // 2),
            "num_genres": (1, lexicon.MAX_GENRES),
            "num_moods": (1, lexicon.MAX_MOODS),
            "latent_width": (1, 1024),
            "zipf": (0, 4),
            "fade_days": (1, 100_000),
            "session_length": (1, 256),
            "seed": (0, 2**63 - 1),
        }
        limits |= {name: (0, 1) for name in ("stay", "step", "follow", "recall", "habit", "stray")}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"World.{name} = {value} makes no world", expected=f"between {low} and {high}")
        for names in (("stay", "step"), ("follow", "recall", "habit")):
            if sum(getattr(self, n) for n in names) > 1:
                raise ConfigError(
                    f"World: {' + '.join(names)} is above 1", expected="probabilities that sum to at most 1"
                )

    @property
    def users(self) -> int:
        return self.num_users or max(1, self.num_events // 20)

    @property
    def items(self) -> int:
        return self.num_items or max(64, 7 * math.isqrt(self.num_events))

    @property
    def genres(self) -> int:
        return self.num_genres or max(4, min(32, math.isqrt(self.items) // 4))

    def laws(self) -> Laws:
        """The hidden laws, with which the best possible predictions can be computed (`Laws.next_item`)."""
        parts = {n: round(getattr(self, n) * PARTS) for n in ("stay", "step", "follow", "recall", "habit", "stray")}
        return make_laws(
            self.seed,
            Chances(fresh=round(PARTS / self.session_length), **parts),
            users=self.users,
            items=self.items,
            genres=self.genres,
            moods=self.num_moods,
            width=self.latent_width,
            zipf=round(self.zipf * 16),
            fade=self.fade_days,
        )

    def log(self, laws: Laws) -> Log:
        """The events that follow from the laws."""
        return make_log(self.seed, laws, history_lengths(self.seed, self.users, self.num_events))

    def tables(self) -> Tables:
        """All tables of the world, as `DataDir.load` would give them."""
        laws = self.laws()
        log = self.log(laws)
        queries, relevance, query_of_cell = make_queries(self.seed, laws)
        users, ids = user_ids(self.seed, self.users), item_ids(self.seed, self.items)
        columns = {"user_id": users[log.user], "item_id": ids[log.item], "timestamp": log.seconds + START}
        interactions = pl.DataFrame(columns)
        if self.searches:
            cell = laws.genre[log.item] * laws.num_moods + laws.mood[log.item]
            asked = pl.Series(log.opens & (log.seconds % 2 == 0))
            interactions = interactions.with_columns(
                query_id=pl.when(asked).then(pl.Series(query_of_cell[cell])).otherwise(None)
            )
        if self.ratings:
            interactions = interactions.with_columns(rating=pl.Series(make_ratings(self.seed, laws, log)))
        return Tables(
            interactions=interactions.with_columns(order=pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")),
            items=make_items(self.seed, laws),
            users=make_users(self.seed, self.users),
            queries=queries,
            relevance=relevance,
            vectors={"content": make_vectors(self.seed, laws)},
            simulated=True,
            notes=(f"simulated world of {self.num_events:,} events (seed {self.seed}); ties in {TIE_RULE}",),
        )

    @property
    def hash(self) -> str:
        """SHA-256 of the settings and the version of the laws."""
        told = asdict(self)
        if not self.ratings:  # came later: a world without them is the one that it was before
            del told["ratings"]
        return hashlib.sha256(f"recjax.world/{VERSION} {sorted(told.items())}".encode()).hexdigest()


def write(world: World, path: str | Path) -> Path:
    """Write the world as a data directory at `path`, which must not exist yet (or be an empty folder)."""
    tables = world.tables()
    frames = {
        "interactions": tables.interactions.drop("order"),
        "items": tables.items,
        "users": tables.users,
        "queries": tables.queries,
        "relevance": tables.relevance,
    }
    marker = {"simulated": True, "version": VERSION, "world": asdict(world), "hash": world.hash}
    return write_directory(path, frames, vectors=tables.vectors, simulated=marker)
