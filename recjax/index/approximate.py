"""Approximate search over the catalogue, by the library faiss: sublinear where `recjax.index.exact` looks at every row.

Inner products become distances by one more dimension, sqrt(M^2 - |x|^2) with M the longest of all vectors (Bachrach et
al. 2014, section 3): |q - x|^2 = |q|^2 + M^2 - 2 q.x, so that the nearest are exactly those of the highest score, and
lists and graphs made for distances work. What is found is scored anew in float32 and ordered as the exact search orders
it, (score descending, row ascending), by the same rules of removal. What it may get wrong is only that an item is
missing, and `ApproximateIndex.recall` says how often.

This runs on the host and is no part of a compiled program. It refuses to train anything but its own lists, and keeps
the vectors as they are: no quantisation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from recjax.core.errors import ConfigError

# A filter that leaves no more items than this is searched exactly.
FEW = 2048
_POINTS_PER_LIST = 39  # below this faiss warns that lists are badly trained
_CONSTRUCTION = 200  # candidates looked at for each item that a graph takes in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Approximation:
    """`kind` "ivf": the vectors in `lists` clusters (default 4 sqrt(n)), of which the `probes` nearest are searched;
    "hnsw": a graph of `links` neighbours each (Malkov & Yashunin 2016), searched with `breadth` candidates at once."""

    kind: str = "ivf"
    lists: int | None = None
    probes: int = 16
    links: int = 32
    breadth: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("lists", "probes", "links", "breadth")}
        if self.kind not in ("ivf", "hnsw") or any(n is not None and n < 1 for n in counts.values()):
            raise ConfigError(
                f"Approximation.kind = {self.kind!r}, {', '.join(f'{k} = {v}' for k, v in counts.items())}",
                expected='"ivf" or "hnsw", and counts of at least 1',
            )


class ApproximateIndex:
    """An index of the `valid` rows of a table [v, d], a copy of which it holds in float32."""

    def __init__(
        self,
        table: Float[np.ndarray, "v d"],
        *,
        valid: Bool[np.ndarray, " v"],
        config: Approximation = Approximation(),  # noqa: B008
    ) -> None:
        """Raises `ConfigError` when faiss is not installed, and where no row is valid or a valid one not finite."""
        self.config, self._faiss = config, _faiss()
        self._rows = np.flatnonzero(valid).astype(np.int32)
        self._place = np.full(len(valid), -1, np.int32)
        self._place[self._rows] = np.arange(len(self._rows))
        self._vectors = np.ascontiguousarray(table[self._rows], np.float32)
        if not len(self._rows) or not np.isfinite(self._vectors).all():
            raise ConfigError("an index needs at least one item, and vectors of finite numbers")
        lengths = np.sum(self._vectors.astype(np.float64) ** 2, axis=1)
        extra = np.sqrt(lengths.max() - lengths).astype(np.float32)
        self._index = self._build(np.concatenate([self._vectors, extra[:, None]], axis=1))

    def top_k(
        self,
        queries: Float[np.ndarray, "b d"],
        k: int,
        *,
        exclude_ids: Int[np.ndarray, "b n"] | None = None,
        allowed: Bool[np.ndarray, "*q v"] | None = None,
    ) -> tuple[Float[np.ndarray, "b k"], Int[np.ndarray, "b k"]]:
        """Scores and rows of about the `k` best, best first; row 0 with score -inf where fewer are left.

        Rows in a query's `exclude_ids` (0 is padding) are left out, and those that are not `allowed`.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        exclude = np.zeros((len(queries), 1), np.int32) if exclude_ids is None else exclude_ids
        if allowed is not None and allowed.ndim == 2:
            found = [
                self.top_k(queries[i : i + 1], k, exclude_ids=exclude[i : i + 1], allowed=allowed[i])
                for i in range(len(queries))
            ]
            return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])
        if allowed is not None:
            allowed = allowed[self._rows]
        places = self._near(queries, min(k + exclude.shape[1], len(self._rows)), allowed)
        scores = np.einsum("bd,bnd->bn", queries, self._vectors[places])
        scores, rows = self._best(scores, places, k, exclude)
        # Nothing that is left is withheld: where lists or graph did not lead to enough, all items are looked at.
        left = np.arange(len(self._rows)) if allowed is None else np.flatnonzero(allowed)
        for i in np.flatnonzero((rows == 0).any(axis=1)) if places.shape[1] < len(left) else ():
            every = (self._vectors[left] @ queries[i])[None]
            scores[i : i + 1], rows[i : i + 1] = self._best(every, left[None], k, exclude[i : i + 1])
        return scores, rows

    def recall(self, queries: Float[np.ndarray, "b d"], rows: Int[np.ndarray, "b k"]) -> float:
        """The share of the `rows` of an exact search for `queries` (0 is padding) that `top_k` finds, too."""
        found = self.top_k(queries, rows.shape[1])[1]
        hits = (rows[:, :, None] == found[:, None, :]).any(axis=2) & (rows > 0)
        return float(hits.sum() / max((rows > 0).sum(), 1))

    @property
    def num_items(self) -> int:
        """How many rows are indexed."""
        return len(self._rows)

    def _build(self, points: np.ndarray) -> Any:
        faiss, c, n = self._faiss, self.config, len(points)
        if c.kind == "hnsw":
            index = faiss.IndexHNSWFlat(points.shape[1], c.links)
            index.hnsw.efConstruction = _CONSTRUCTION
        else:
            lists = c.lists or min(round(4 * math.sqrt(n)), n // _POINTS_PER_LIST)
            lists = min(max(lists, 1), n)
            self._quantizer = faiss.IndexFlatL2(points.shape[1])  # the index does not keep it alive
            index = faiss.IndexIVFFlat(self._quantizer, points.shape[1], lists)
            index.cp.seed, index.cp.min_points_per_centroid = c.seed, 1
            index.train(points)
        index.add(points)
        return index

    def _near(self, queries: np.ndarray, wanted: int, allowed: np.ndarray | None) -> np.ndarray:
        """Places [b, wanted] among the valid rows, -1 where fewer were found."""
        faiss, c = self._faiss, self.config
        share, chosen = 1.0, {}
        if allowed is not None:
            places = np.flatnonzero(allowed)
            if len(places) <= FEW:
                return np.broadcast_to(places, (len(queries), len(places)))
            # As many allowed items are looked at as there would be items without the filter.
            share = len(places) / len(allowed)
            bits = np.packbits(allowed, bitorder="little")
            chosen = {"sel": faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))}
        if c.kind == "hnsw":
            breadth = min(math.ceil(max(c.breadth, wanted) / share), len(self._rows))
            how = faiss.SearchParametersHNSW(efSearch=breadth, **chosen)
        else:
            how = faiss.SearchParametersIVF(nprobe=min(math.ceil(c.probes / share), self._index.nlist), **chosen)
        points = np.concatenate([queries, np.zeros((len(queries), 1), np.float32)], axis=1)
        return self._index.search(points, wanted, params=how)[1]

    def _best(
        self, scores: np.ndarray, places: np.ndarray, k: int, exclude: Shaped[np.ndarray, "b n"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` of what was found, in the order of the exact search."""
        rows = np.where(places >= 0, self._rows[places], 0)
        removed = (rows == 0) | (rows[:, :, None] == exclude[:, None, :]).any(axis=2)
        scores = np.where(removed, -np.inf, scores).astype(np.float32)
        order = np.lexsort((rows, -scores))[:, :k]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        missing = [(0, 0), (0, k - rows.shape[1])]
        scores = np.pad(scores, missing, constant_values=-np.inf)
        return scores, np.where(scores == -np.inf, 0, np.pad(rows, missing)).astype(np.int32)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "an approximate index needs faiss, which is not installed", mend="pip install 'recjax[serve]'"
        ) from None
    return faiss
