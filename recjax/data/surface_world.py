"""A simulated world of two surfaces: much organic content and few ads, shown to the same users for some months.

What organic clicks tell of a user and of an item holds for ads, too, but not all of it: part of every taste lasts, part
belongs to two months and is gone; ads are clicked less, on other devices, and for reasons of their own. New ads appear
month after month that organic content has shown before. The chance of every click is known. The calendar that
E-CDCTR's card asks for (Liu et al. 2024, arXiv 2408.16238) walks over this log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from recjax.data.draws import Stream, power
from recjax.data.rated_world import DEVICES, Drawn, RatedWorld, best_auc, chances, skewed
from recjax.data.small_world import check_limits

ORGANIC, ADS = range(2)
_WIDTH = 2  # of a taste: so much can be learned of it in some months


@dataclass(frozen=True, kw_only=True)
class SurfaceWorld(RatedWorld):
    """`rows` impressions in order of time, with the columns of `RatedWorld`, and the surface in the place of a domain.

    A share `ads` of the rows are ads, of a share `ad_items` of the items. Organic content shows each of these items a
    `leak` as often as it would another one. Half of the ads are there from the first of the `months`, which have
    equally many rows, the others begin later. `drift` is how large the passing part of a taste is beside the lasting
    one, `shift` how large the change of taste on ads is, of `rank`; `gap` lowers the scores of ads.
    """

    items: int = 300
    users: int = 500
    rows: int = 200_000
    domains: int = 2
    shift: float = 0.4
    months: int = 8
    ads: float = 0.12
    ad_items: float = 0.1
    leak: float = 0.3
    drift: float = 0.5
    gap: float = 0.4
    kind: ClassVar[str] = "surfaces"
    column: ClassVar[str] = "surface"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self, domains=(2, 2), months=(1, 1000), ads=(0.001, 0.999), ad_items=(0.001, 0.999))
        check_limits(self, leak=(0.001, 1), drift=(0, 10), gap=(-10, 10))

    @property
    def names(self) -> tuple[str, ...]:
        return ("organic", "ads")

    def month(self) -> np.ndarray:
        """int64 [rows]: from 0 on."""
        return np.arange(self.rows) * self.months // self.rows

    def begins(self) -> np.ndarray:
        """int64 [items]: the month in which an item becomes an ad; `months` for one that never does."""
        begins = np.full(self.items, self.months)
        chosen = Stream(self.seed, 701).order(self.items)[: max(1, round(self.items * self.ad_items))]
        later = Stream(self.seed, 702).below(2 * self.months, len(chosen)) - self.months
        begins[chosen] = np.maximum(later, 0)
        begins[chosen[0]] = 0  # so that there are ads in every month
        return begins

    def draw(self) -> Drawn:
        """All rows, in order of time; the domain of a row is `ORGANIC` or `ADS`."""
        n, month, begins = self.rows, self.month(), self.begins()
        user = skewed(Stream(self.seed, 201), power(np.arange(1, self.users + 1), -8), n)
        surface = (Stream(self.seed, 703).below(1000, n) < round(1000 * self.ads)).astype(np.int64)
        weight = power(np.arange(1, self.items + 1) + 9, -12) * np.where(begins < self.months, self.leak, 1.0)
        by_begin = np.argsort(begins, kind="stable")
        there = np.searchsorted(begins[by_begin], month, side="right")
        ad = by_begin[Stream(self.seed, 704).below(there)]
        item = np.where(surface == ADS, ad, skewed(Stream(self.seed, 202), weight, n))
        devices = [Stream(self.seed, purpose).below(len(DEVICES), n) for purpose in (204, 705)]
        device = np.where(surface == ADS, np.minimum(*devices), devices[0])  # ads are met on phones, mostly
        hour = Stream(self.seed, 205).below(24, n)
        lasting, feature = self._taste(206, self.users)[user], self._taste(207, self.items)[item]
        passing = self._taste(706, (self.months + 1) * self.users).reshape(self.months + 1, self.users, _WIDTH)
        passing = passing[month, user] + passing[month + 1, user]  # half of it is there next month
        fit = (lasting * feature).sum(1) * 1.0 + (passing * feature).sum(1) * self.drift / np.sqrt(2.0)
        into, out = (self._taste(purpose, self.rank) for purpose in (208, 209))
        moved = ((lasting @ into.T) * (feature @ out.T)).sum(1) * self.shift / (26.0 * np.sqrt(float(self.rank)))
        fit = fit + np.where(surface == ADS, moved, 0.0)
        quality, pair = self._beside(item, device)
        score = fit / 24.0 + quality + pair - 0.4 - np.where(surface == ADS, self.gap, 0.0)
        chance = chances(score / self.noise)
        click = Stream(self.seed, 212).below(1 << 16, n) < chance
        return Drawn(user, item, surface, device, hour, chance, score, click)

    def _taste(self, purpose: int, count: int) -> np.ndarray:
        """int64 [count, `_WIDTH`]."""
        return self._latent(purpose, count)[:, :_WIDTH]

    def measured(self, made: Drawn) -> dict[str, Any]:
        """Of each surface its share of the rows, the share of clicks, and the AUC of the chances themselves."""
        found = {}
        for number, name in enumerate(self.names):
            mine = made.domain == number
            found[f"{name}_rows"] = round(float(mine.mean()), 4)
            found[f"{name}_clicks"] = round(float(made.click[mine].mean()), 4)
            found[f"{name}_best_auc"] = best_auc(made.chance[mine], made.click[mine])
        return found
