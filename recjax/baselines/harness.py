"""Ranks from a scorer, by the same users, candidates, removals and tie rule as a trained model.

The harness scores a batch of users at a time against the whole catalogue and leaves ranking to
`recjax.index.exact`, so a baseline and a model can only differ in their scores. Settings are chosen by NDCG@10 on
the validation split, never on the test split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from recjax.baselines.records import Records
from recjax.index.exact import place_among, rank_scores
from recjax.metrics.topk import Mean, merge, topk_state

TUNING_USERS = 2000
_CELLS = 2**23


@runtime_checkable
class Scorer(Protocol):
    """A system without a model: scores for every row of the catalogue from a user's history."""

    @property
    def settings(self) -> dict[str, float]:
        """The hyper-parameters in use, for the record."""
        ...

    def scores(self, records: Records) -> np.ndarray:
        """float32 [n, v], higher is better, finite."""
        ...


class Ranked(NamedTuple):
    """What ranking a batch of users gives: rank int32 [n] of each label, best rows int32 [n, k] (0: none).

    Also the rank among sampled candidates and the negative log-likelihood of the label, where there are any.
    """

    user_index: np.ndarray
    label: np.ndarray
    rank: np.ndarray
    rows: np.ndarray
    sampled_rank: np.ndarray | None = None
    nll: np.ndarray | None = None


Settings = TypeVar("Settings")


def rank_batches(
    scorer: Scorer,
    records: Records,
    valid: np.ndarray,
    k: int,
    *,
    remove_seen: bool,
    candidates: np.ndarray | None = None,
) -> Iterator[Ranked]:
    """Rank every user's label among the `valid` rows, a batch of users at a time, and among `candidates` [n, c]."""
    size = int(np.clip(_CELLS // len(valid), 1, 512))
    for start in range(0, len(records), size):
        part = records.take(np.arange(start, min(start + size, len(records))))
        seen = part.padded() if remove_seen else np.zeros((len(part), 1), np.int32)
        fill, scores = size - len(part), scorer.scores(part)
        found = _rank(_fill(scores, fill), _fill(part.label, fill), valid, _fill(seen, fill), k)
        rank, rows = (np.asarray(x)[: len(part)] for x in (found.rank, found.rows))
        among = None
        if candidates is not None:
            among = _rank_among(scores, part.label, candidates[start : start + len(part)])
        yield Ranked(part.user_index, part.label, rank, rows, among)


def choose(
    make: Callable[[Settings], Scorer],
    grid: Iterable[Settings],
    records: Records,
    valid: np.ndarray,
    *,
    remove_seen: bool,
    seed: int = 0,
) -> Scorer:
    """The scorer of the settings with the best NDCG@10 on (at most `TUNING_USERS` users of) the validation split.

    The first of equals is taken; the users are drawn by `seed`.
    """
    if len(records) > TUNING_USERS:
        users = np.random.default_rng(seed).choice(len(records), TUNING_USERS, replace=False)
        records = records.take(np.sort(users))
    best: tuple[float, Scorer] | None = None
    for settings in grid:
        scorer = make(settings)
        state: dict[str, Mean] = {}
        for found in rank_batches(scorer, records, valid, 1, remove_seen=remove_seen):
            state = merge(state, topk_state(found.rank, (10,)))
        value = state["ndcg@10"].value if state else 0.0
        if best is None or value > best[0]:
            best = value, scorer
    if best is None:
        raise ValueError("an empty grid")
    return best[1]


def _fill(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows of zeros at the end, so that every batch has the shape that is compiled already."""
    return np.concatenate([rows, np.zeros((count, *rows.shape[1:]), rows.dtype)]) if count else rows


@functools.partial(jax.jit, static_argnums=4)
def _rank(scores: jax.Array, label: jax.Array, valid: jax.Array, seen: jax.Array, k: int):
    return rank_scores(jnp.asarray(scores), label, k, valid=valid, exclude_ids=seen)


def _rank_among(scores: np.ndarray, label: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The label's place among its candidates, by the order of `recjax.index.exact`."""
    rows = np.concatenate([label[:, None], candidates], axis=1)
    picked = np.take_along_axis(scores, rows, axis=1).astype(np.float32)
    return np.asarray(place_among(*map(jnp.asarray, (picked, label, candidates))))
