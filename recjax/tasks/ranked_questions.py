"""What the kinds of ranking tasks ask: who, after which events, about which candidates, and what the right answers are.

A question ends its history before all that it asks about: the events of a record's candidates, and those at the same
second, are never in its prompt. Draws are hashes of the user and the event, so that neither the order of users nor
the number of questions changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recjax.core.errors import DataError
from recjax.data.hashing import hashed_with, hashes, uniform
from recjax.tasks.prompted_log import TRAIN, Log
from recjax.tasks.prompted_ranking import GenreAffinity, Ranked, Rated, Stars, WatchNext

_CHOSEN, _DRAWN, _GENRE = 0x63686F73, 0x64726177, 0x67656E72  # what a draw is for
_TRIES = 8


class Asked(NamedTuple):
    """A user, the event that the history ends before, the fields of each question, and the right answers."""

    user: int
    end: int
    questions: list[dict[str, str]]
    labels: list[int]


Questions = Callable[[int], Iterator[Asked]]  # of a period: 0 training, 1 validation, 2 test


def rated(task: Rated | Stars, log: Log) -> Questions:
    """Questions about the ratings of events; raises `DataError` for a log without any."""
    if not log.has_ratings:
        raise DataError(
            f"the task {task.name} needs ratings",
            where="interactions",
            expected="a column rating (or value) of numbers",
            mend='map it, DataDir.columns = {"rating": "stars"}, or take the task out of the mixture',
        )
    if isinstance(task, Rated):
        label = (log.rating >= task.least).astype(np.int64)
    else:
        label = np.clip(np.floor(np.nan_to_num(log.rating) + 0.5), 1, len(task.words)).astype(np.int64) - 1

    def ask(user: int, events: Sequence[int]) -> Asked:
        questions = [{"item": log.texts[log.item[event]]} for event in events]
        return Asked(user, int(log.before[events[0]]), questions, [int(label[event]) for event in events])

    def questions(period: int) -> Iterator[Asked]:
        for user, events in rated_events(task, log, period):
            if period == TRAIN:
                places = np.searchsorted(events, _chosen(task, events)).tolist()
                yield from (ask(user, events[place : place + task.together].tolist()) for place in places)
            else:
                yield ask(user, events.tolist())

    return questions


def rated_events(task: Rated | Stars, log: Log, period: int) -> Iterator[tuple[int, np.ndarray]]:
    """Users and their rated events of a period that can be asked about; of a held-out one, those that are."""
    for user, events in _users(task, log, period):
        events = events[~np.isnan(log.rating[events])]
        if len(events):
            yield user, events if period == TRAIN else events[: task.candidates]


def watch_next(task: WatchNext, log: Log) -> Questions:
    """Questions about the next item and drawn ones."""
    candidates = next_items(task, log)

    def questions(period: int) -> Iterator[Asked]:
        for user, event, items in candidates(period):
            asked = [{"item": log.texts[item]} for item in items]
            yield Asked(user, int(log.before[event]), asked, [1, *[0] * (len(items) - 1)])

    return questions


def next_items(task: WatchNext, log: Log) -> Callable[[int], Iterator[tuple[int, int, list[int]]]]:
    """Of a period: users, events and the items asked about, that of the event first."""
    counts = np.bincount(log.item[log.period == TRAIN], minlength=len(log.texts)).astype(np.float64)
    weights = counts if task.draw == "popular" else np.ones(len(log.texts))
    cumulative = np.cumsum(weights)
    if np.count_nonzero(weights) < 2:
        raise DataError("there are too few items to draw from", where=f"task {task.name}", expected="at least two")

    def drawn(event: int, known: set[int], count: int) -> list[int]:
        draws = uniform(hashes(count * _TRIES, task.seed, _DRAWN, event)) * cumulative[-1]
        found = np.searchsorted(cumulative, draws, side="right").tolist()
        return [item for item in dict.fromkeys(found) if item not in known][:count]

    def candidates(period: int) -> Iterator[tuple[int, int, list[int]]]:
        for user, events in _users(task, log, period):
            known = log.item[log.offsets[user] : log.offsets[user + 1]]
            if period == TRAIN:
                asked, count = _chosen(task, events), task.negatives
                known = log.item[log.of_period(user, TRAIN)]
            else:
                asked, count = [int(events[0])], task.candidates - 1
            not_drawn = set(known.tolist())
            for event in asked:
                yield user, event, [int(log.item[event]), *drawn(event, not_drawn, count)]

    return candidates


def genre_affinity(task: GenreAffinity, log: Log) -> Questions:
    """Questions about genres; raises `DataError` for a catalogue without two of them."""
    trained = log.item[log.period == TRAIN].tolist()
    counts: dict[str, int] = {}
    for item in trained:
        for genre in log.genres[item]:
            counts[genre] = counts.get(genre, 0) + 1
    genres = sorted(counts, key=lambda g: (-counts[g], g))[: task.candidates]
    if len(genres) < 2:
        raise DataError(
            f"the task {task.name} needs genres",
            where="items",
            expected=f"a column {' or '.join(task.wording.genres.columns)} with at least two of them",
            mend="set Wording.genres to the column that has them, or take the task out of the mixture",
        )

    def ask(user: int, event: int, following: Sequence[int], asked: Sequence[str]) -> Asked:
        coming = {genre for e in following for genre in log.genres[log.item[e]]}
        questions = [{"genre": genre, "horizon": str(task.horizon)} for genre in asked]
        return Asked(user, int(log.before[event]), questions, [int(genre in coming) for genre in asked])

    def one_of_each(event: int, following: Sequence[int]) -> list[str]:
        coming = {genre for e in following for genre in log.genres[log.item[e]]}
        found = [genres[k] for k in np.argsort(hashes(len(genres), task.seed, _GENRE, event)).tolist()]
        first = (next((g for g in found if (g in coming) == is_coming), None) for is_coming in (True, False))
        both = [genre for genre in first if genre is not None]
        return [*both, *(genre for genre in found if genre not in both)][: max(task.together, len(both))]

    def questions(period: int) -> Iterator[Asked]:
        for user, events in _users(task, log, period):
            events = events.tolist()
            # Only events with a whole horizon of the same period behind them.
            last = len(events) - task.horizon + 1
            if last < 1:
                continue
            places = {event: place for place, event in enumerate(events[:last])}
            if period != TRAIN:
                yield ask(user, events[0], events[: task.horizon], genres)
                continue
            for event in _chosen(task, np.array(events[:last])):
                following = events[places[event] : places[event] + task.horizon]
                if asked := one_of_each(event, following):
                    yield ask(user, event, following, asked)

    return questions


def _users(task: Ranked, log: Log, period: int) -> Iterator[tuple[int, np.ndarray]]:
    """Users with events of a period that have at least `min_history` older ones, and these events."""
    first = np.repeat(log.offsets[:-1], np.diff(log.offsets))
    asked = (log.period == period) & (log.before - first >= task.min_history)
    events = np.flatnonzero(asked)
    user = np.searchsorted(log.offsets, events, side="right") - 1
    bounds = np.flatnonzero(np.diff(user)) + 1
    for group in np.split(events, bounds):
        if len(group):
            yield int(np.searchsorted(log.offsets, group[0], side="right")) - 1, group


def _chosen(task: Ranked, events: np.ndarray) -> list[int]:
    """The training events of a user that are asked about, in order."""
    drawn = hashed_with(np.repeat(hashes(1, task.seed, _CHOSEN), len(events)), events)
    return sorted(events[np.argsort(drawn, kind="stable")[: task.per_user]].tolist())
