"""From judgments to the pairs of query and item that a search task trains on and holds out.

Pure functions of arrays. Everything that is drawn is a hash of ids, so that neither the order of a file nor what else
is in it moves a pair to another split.

What leakage control means here: a system that recommends and searches is tested on what a user did later. A judgment
that such a later action left behind (the user's tag on the held-out item) would tell the search half the answer, so it
makes no training pair. See `is_leak`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recjax.data.hashing import hashed_with, mixed, uniform

TRAIN, VALID, TEST = range(3)
_SPLIT, _LIMIT = 0x53504C54, 0x4C494D54  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class Judgments:
    """Relevant pairs as they were judged, some perhaps several times.

    [n] each: `query` (number of the query), `row` (item row), `user` (number of the user in the log, -1 where nobody of
    the log is named), and uint64 hashes of the ids of query and item.
    """

    query: np.ndarray
    row: np.ndarray
    user: np.ndarray
    query_hash: np.ndarray
    item_hash: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def take(self, at: np.ndarray) -> Judgments:
        """Some of them."""
        return Judgments(**{name: values[at] for name, values in vars(self).items()})


def split_of(judged: Judgments, by: str, *, valid: float, test: float, seed: int) -> np.ndarray:
    """int8 [n]: TRAIN, VALID or TEST of every judgment; the same for all judgments of a pair ("query": of a query)."""
    state = _drawn(judged.query_hash, seed, _SPLIT)
    if by == "pair":
        state = hashed_with(state, judged.item_hash)
    drawn = uniform(state)
    return np.where(drawn < test, TEST, np.where(drawn < test + valid, VALID, TRAIN)).astype(np.int8)


def is_leak(judged: Judgments, held_user: np.ndarray, held_row: np.ndarray) -> np.ndarray:
    """bool [n]: judgments by a user on an item of the user's own held-out events (`held_user`, `held_row`)."""
    key, held = (user.astype(np.int64) << 32 | row for user, row in ((judged.user, judged.row), (held_user, held_row)))
    return (judged.user >= 0) & np.isin(key, held)


def first_of_pairs(judged: Judgments) -> np.ndarray:
    """int64: one judgment of each pair of query and item, in order of query and then item row."""
    order = np.lexsort((judged.row, judged.query))
    query, row = judged.query[order], judged.row[order]
    return order[np.concatenate([[True], (query[1:] != query[:-1]) | (row[1:] != row[:-1])])[: len(order)]]


def within_limit(pairs: Judgments, per_item: int, *, seed: int) -> np.ndarray:
    """bool [n]: at most `per_item` pairs of every item, those of the lowest hash."""
    drawn = hashed_with(_drawn(pairs.item_hash, seed, _LIMIT), pairs.query_hash)
    order = np.lexsort((pairs.query, drawn, pairs.row))
    row = pairs.row[order]
    first = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]])[: len(row)])
    number = np.arange(len(row)) - np.repeat(first, np.diff(np.append(first, len(row))))
    kept = np.empty(len(row), bool)
    kept[order] = number < per_item
    return kept


def _drawn(hashes: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    key = mixed(mixed(np.array([seed % 2**64], np.uint64)) ^ np.uint64(purpose))
    return mixed(hashes ^ key)
