"""Sampled candidates: for each user a fixed handful of items never seen, beside which the target is ranked.

Ranking among a few random items is the protocol of SASRec, BERT4Rec and PrepRec. It flatters every system and can
change their order, so metrics from it are only ever shown beside the full ranking. The draw of a user depends on the
seed, the user's number and what the user has seen alone: not on batches, processes or the system evaluated.
"""

from __future__ import annotations

import numpy as np

from recjax.data.hashing import mixed, uniform
from recjax.data.record import spans

_USERS_AT_ONCE = 4096


def hashed(*words: int | np.ndarray) -> np.ndarray:
    """uint64: a hash of whole numbers taken in turn; arrays broadcast, and at least one has a dimension."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(w) for w in words)), np.uint64)
    for word in words:
        state = mixed(state ^ np.asarray(word).astype(np.int64).astype(np.uint64))
    return state


def below(bound: int | np.ndarray, *words: int | np.ndarray) -> np.ndarray:
    """int64: uniform in [0, bound), a function of the words alone; 0 < bound < 2**31."""
    return ((hashed(*words) >> np.uint64(32)) * np.asarray(bound).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def share(*words: int | np.ndarray) -> np.ndarray:
    """float64: uniform in [0, 1), a function of the words alone."""
    return uniform(hashed(*words))


def draw_candidates(
    seen: np.ndarray, offsets: np.ndarray, label: np.ndarray, user_index: np.ndarray, rows: slice, count: int, seed: int
) -> np.ndarray:
    """int32 [n, count]: for each user that many distinct rows of `rows`, none seen and none the label.

    User u has seen `seen[offsets[u]:offsets[u + 1]]`. Uniform without replacement; where a user has fewer unseen items
    than `count`, all of them and then 0.
    """
    out = np.zeros((len(label), count), np.int32)
    for start in range(0, len(label), _USERS_AT_ONCE):
        users = np.arange(start, min(start + _USERS_AT_ONCE, len(label)))
        out[users] = _draw(seen, offsets, label, user_index, rows, count, seed, users)
    return out


def _draw(seen, offsets, label, user_index, rows: slice, count: int, seed: int, users: np.ndarray) -> np.ndarray:
    size = rows.stop - rows.start
    lengths = offsets[users + 1] - offsets[users]
    known = seen[spans(offsets[users], lengths)].astype(np.int64)
    owner = np.repeat(np.arange(len(users)), lengths)
    taken = np.concatenate([owner * rows.stop + known, np.arange(len(users)) * rows.stop + label[users]])
    inside = np.concatenate([(known >= rows.start) & (known < rows.stop), np.ones(len(users), bool)])
    taken = np.unique(taken[inside])
    unseen = size - np.bincount(taken // rows.stop, minlength=len(users))
    out = np.zeros((len(users), count), np.int32)
    few = unseen <= count
    for at in np.flatnonzero(few):
        mine = taken[np.searchsorted(taken, at * rows.stop) : np.searchsorted(taken, (at + 1) * rows.stop)]
        left = np.setdiff1d(np.arange(rows.start, rows.stop), mine - at * rows.stop)
        out[at, : len(left)] = left
    waiting, tries = np.flatnonzero(~few), 2 * count + 8
    while len(waiting):
        done, found = _first_distinct(taken, user_index[users[waiting]], waiting, rows, count, seed, tries)
        out[waiting[done]] = found
        waiting, tries = waiting[~done], 2 * tries
    return out


def _first_distinct(taken, numbers, at, rows: slice, count: int, seed: int, tries: int):
    """Who has `count` distinct untaken rows among the first `tries` draws, and the first of those rows."""
    drawn = rows.start + below(rows.stop - rows.start, seed, numbers[:, None], np.arange(tries)[None])
    key = at[:, None] * rows.stop + drawn
    place = np.minimum(np.searchsorted(taken, key), max(len(taken) - 1, 0))
    free = taken[place] != key
    _, first = np.unique(key, return_index=True)
    is_first = np.zeros(key.size, bool)
    is_first[first] = True
    good = free & is_first.reshape(key.shape)
    done = good.sum(axis=1) >= count
    good = good[done] & (np.cumsum(good[done], axis=1) <= count)
    return done, drawn[done][good].reshape(-1, count).astype(np.int32)
