"""A simulated world of rows with labels: who was shown what, where, and whether they clicked and how they rated it.

A click depends on a taste that only ids tell (user times item), on an item's quality, on a pair of columns of the row
(device and genre, which no column tells alone), and in each domain on a change of the taste of low rank. The chance of
every click is known, so that the best AUC any model can reach is, too. Arithmetic is on whole numbers and on sums,
quotients and square roots, which are the same everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import polars as pl

from recjax.data import lexicon
from recjax.data.directory import write_directory
from recjax.data.draws import Stream, power
from recjax.data.small_world import START, VERSION, SmallWorld, check_limits
from recjax.data.tables import Tables

_WIDTH, _REACH = 8, 7  # latent factors, whole numbers from -7 to 7
DEVICES, _SECONDS = ("phone", "tablet", "desktop", "tv"), 150
_CHANCES = 2**16


class Drawn(NamedTuple):
    """One entry for each row; `chance` is that of a click in 65536ths, `score` what a rating follows from."""

    user: np.ndarray
    item: np.ndarray
    domain: np.ndarray
    device: np.ndarray
    hour: np.ndarray
    chance: np.ndarray
    score: np.ndarray
    click: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RatedWorld(SmallWorld):
    """`rows` impressions in order of time, with columns click (0 or 1), rating (1 to 5), domain, device and hour.

    Domain d has half as many rows as d - 1. `shift` is how large the change of taste in a domain is beside the common
    taste, `rank` that change's rank. `noise` makes chances flatter: 0 says what will be clicked almost surely.
    """

    items: int = 300
    users: int = 400
    rows: int = 20_000
    genres: int = 8
    domains: int = 3
    shift: float = 0.0
    rank: int = 2
    noise: float = 1.0
    kind: ClassVar[str] = "ratings"
    column: ClassVar[str] = "domain"

    def __post_init__(self) -> None:
        check_limits(self, items=(8, 10**6), users=(2, 10**7), rows=(100, 10**8), genres=(2, lexicon.MAX_GENRES))
        check_limits(self, domains=(1, 64), shift=(0, 10), rank=(1, _WIDTH), noise=(0.01, 100))

    @property
    def names(self) -> tuple[str, ...]:
        """What the domains are called."""
        return tuple(f"site{d}" for d in range(self.domains))

    def draw(self) -> Drawn:
        """All rows, in order of time."""
        n = self.rows
        user = skewed(Stream(self.seed, 201), power(np.arange(1, self.users + 1), -8), n)
        item = skewed(Stream(self.seed, 202), power(np.arange(1, self.items + 1) + 9, -12), n)
        domain = skewed(Stream(self.seed, 203), 0.5 ** np.arange(self.domains), n)
        device = Stream(self.seed, 204).below(len(DEVICES), n)
        hour = Stream(self.seed, 205).below(24, n)
        taste, feature = self._latent(206, self.users)[user], self._latent(207, self.items)[item]
        fit = (taste * feature).sum(1) * 32.0
        if self.shift:
            into, out = (self._latent(k, self.domains * self.rank) for k in (208, 209))
            into, out = (x.reshape(self.domains, self.rank, _WIDTH)[domain] for x in (into, out))
            moved = ((into * taste[:, None]).sum(2) * (out * feature[:, None]).sum(2)).sum(1)
            fit = fit + moved * self.shift / np.sqrt(float(self.rank))
        quality, pair = self._beside(item, device)
        score = fit / 1500.0 + quality + pair - 0.4
        chance = chances(score / self.noise)
        click = Stream(self.seed, 212).below(_CHANCES, n) < chance
        return Drawn(user, item, domain, device, hour, chance, score, click)

    def measured(self, made: Drawn) -> dict[str, Any]:
        """The share of clicks, and the AUC of the chances themselves on the clicks there were."""
        return {"clicks": round(float(made.click.mean()), 4), "best_auc": best_auc(made.chance, made.click)}

    def tables(self) -> Tables:
        """All tables; a note says what was measured."""
        made = self.draw()
        told = ", ".join(f"{name} {value}" for name, value in self.measured(made).items())
        rows = self._rows(made).sort(["user_id", "timestamp"], maintain_order=True)
        return Tables(
            interactions=rows.with_columns(order=pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")),
            items=self._items(),
            users=self._users(),
            simulated=True,
            notes=(f"simulated world {self.kind} (seed {self.seed}); measured: {told}",),
        )

    def write(self, path: str | Path) -> Path:
        """Write a data directory, which must not exist; its `simulated.json` has the settings and what was measured."""
        made = self.draw()
        marker = {"simulated": True, "kind": self.kind, "version": VERSION, "world": asdict(self), "hash": self.hash}
        marker["measured"] = self.measured(made)
        frames = {"interactions": self._rows(made), "items": self._items(), "users": self._users()}
        return write_directory(path, frames, simulated=marker)

    def _rows(self, made: Drawn) -> pl.DataFrame:
        stars = Stream(self.seed, 213).below(1001, self.rows) / 1000.0 - 0.5
        rating = np.clip(np.floor(3.0 + made.score + stars), 1, 5).astype(np.int64)
        day = START + np.arange(self.rows) * _SECONDS // 86_400 * 86_400
        second = np.arange(self.rows) * _SECONDS % 86_400
        columns = {
            "user_id": made.user + 1,
            "item_id": made.item + 1,
            "timestamp": day + second,
            "click": made.click.astype(np.int64),
            "rating": rating,
            self.column: pl.Series(self.names).gather(made.domain),
            "device": pl.Series(DEVICES).gather(made.device),
            "hour": made.hour,
        }
        return pl.DataFrame(columns)

    def _items(self) -> pl.DataFrame:
        genre, other = self._genre(), Stream(self.seed, 215).below(self.genres, self.items)
        price = Stream(self.seed, 216).below(5000, self.items) + 1
        words = [lexicon.genre_word(g) for g in range(self.genres)]
        genres = [words[a] if a == b else f"{words[a]}|{words[b]}" for a, b in zip(genre, other, strict=True)]
        titles = [lexicon.name(k) for k in range(self.items)]
        frame = pl.DataFrame({"item_id": np.arange(1, self.items + 1), "title": titles, "genres": genres})
        priced = pl.Series("price", np.where(price % 10 == 0, np.nan, price / 100.0)).fill_nan(None)
        return frame.with_columns(priced, genre=pl.Series(words).gather(genre))

    def _users(self) -> pl.DataFrame:
        age = Stream(self.seed, 217).below(60, self.users) + 15
        country = Stream(self.seed, 218).below(len(lexicon.COUNTRIES), self.users)
        frame = pl.DataFrame({"user_id": np.arange(1, self.users + 1), "age": age})
        known = pl.when(pl.col("age") % 7 != 0).then(pl.col("age"))
        return frame.with_columns(age=known, country=pl.Series(lexicon.COUNTRIES).gather(country))

    def _beside(self, item: np.ndarray, device: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What of a row's score is not a matter of taste: the quality of the item, the pair of device and genre."""
        quality = (Stream(self.seed, 210).below(201, self.items) - 100)[item] / 100.0
        pair = Stream(self.seed, 211).below(3, len(DEVICES) * self.genres).reshape(-1, self.genres) - 1
        return quality, pair[device, self._genre()[item]] * 0.8

    def _genre(self) -> np.ndarray:
        return Stream(self.seed, 214).below(self.genres, self.items)

    def _latent(self, purpose: int, count: int) -> np.ndarray:
        """int64 [count, width]: whole numbers around 0."""
        return Stream(self.seed, purpose).below(2 * _REACH + 1, count * _WIDTH).reshape(count, _WIDTH) - _REACH


def chances(sharp: np.ndarray) -> np.ndarray:
    """int64 [n]: 65536ths, a half for a score of 0."""
    return np.floor(_CHANCES * (0.5 + 0.5 * sharp / np.sqrt(1 + sharp * sharp))).astype(np.int64)


def best_auc(chance: np.ndarray, click: np.ndarray) -> float:
    """The AUC of the chances on the clicks there were, to four digits."""
    order = np.argsort(chance, kind="stable")
    _, tie = np.unique(chance[order], return_inverse=True)
    rank = (np.bincount(tie, np.arange(1, len(order) + 1)) / np.bincount(tie))[tie]
    clicks = int(click.sum())
    wins = rank[click[order]].sum() - clicks * (clicks + 1) / 2
    return round(float(wins) / (clicks * (len(order) - clicks)), 4)


def skewed(stream: Stream, weight: np.ndarray, n: int) -> np.ndarray:
    """int64 [n]: numbers drawn in proportion to their weight, rounded to whole thousandths of the largest."""
    reach = np.cumsum(np.floor(1000 * weight / weight.max()).astype(np.int64) + 1)
    return np.searchsorted(reach, stream.below(int(reach[-1]), n), side="right")
