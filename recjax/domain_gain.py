"""Whether an arm gains more in small domains: the rank correlation of its gains with the sizes of domains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.tables import Table, number, signed

_SIZE = re.compile(r"\(([\d,]+) rows\)$")
_FEWEST = 3


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; NaN where either is constant."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (x, y)]
    if min(np.ptp(r) for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def gain_table(found: Mapping[str, Any], metric: str = "auc") -> Table:
    """For each arm of `arms.compare_arms` its gain in every domain, largest first, over the arm it is held against, and
    the rank correlation of the gains with the numbers of rows. Empty with fewer than three domains."""
    domains: dict[str, int] = {}
    gains: dict[str, dict[str, float]] = {}
    for name, arm in found["arms"].items():
        for title, group in arm["hard"].get("domains", {}).items():
            difference, size = group.get("difference", {}).get(metric), _SIZE.search(title)
            if difference is not None and size is not None and not np.isnan(difference["mean"]):
                domains[title] = int(size[1].replace(",", ""))
                gains.setdefault(name, {})[title] = difference["mean"]
    order = sorted(domains, key=lambda title: -domains[title])
    rows = []
    for name, by_domain in gains.items():
        known = [title for title in order if title in by_domain]
        if len(known) >= _FEWEST:
            tied = rank_correlation([domains[t] for t in known], [by_domain[t] for t in known])
            rows.append([name, *(signed(by_domain[t]) if t in by_domain else "" for t in order), number(tied)])
    title = f"Gain in {metric} by domain, and its rank correlation with the rows of the domain"
    return Table(title=title, header=["", *order, "correlation"], rows=rows)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
