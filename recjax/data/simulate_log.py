"""The hidden laws of the simulated world and the log they produce.

An item has a genre, a mood, a popularity that follows Zipf's law, and a time of birth after which interest fades. A
user has a latent taste over genres and a few moods of their own. Events come in sessions. Within a session the genre
mostly stays or moves to a neighbouring genre, and the mood follows from the mood of the last item or of the one
before; a new session starts from the user's taste. Items inside a (genre, mood) cell are drawn by popularity at that
time, without repeats. So the next item is predictable from the history through a few latent factors, while counts of
item pairs stay thin.

All arithmetic is on integers; probabilities are in 256ths. Loops run over steps, never over users or events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from recjax.data.draws import Stream, halving, power

PARTS = 256
PERIODS = 64
DAY = 86_400
YEAR = 365 * DAY
_HALF_STEPS = 16
_TRIES = 6


@dataclass(frozen=True, kw_only=True)
class Chances:
    """How the next event comes about, in 256ths."""

    fresh: int  # a new session starts
    stay: int  # within a session: the genre stays
    step: int  # within a session: the genre moves on to its neighbour
    follow: int  # the mood follows from that of the last item
    recall: int  # the mood follows from that of the item before the last
    habit: int  # the mood is one of the user's own
    stray: int  # any item, by popularity


@dataclass(frozen=True)
class Laws:
    """Everything hidden. Items are sorted by cell (genre, mood): `starts[cell] : starts[cell + 1]` are its items."""

    chances: Chances
    genre: np.ndarray  # [v]
    mood: np.ndarray  # [v]
    starts: np.ndarray  # [genres * moods + 1]
    weight: np.ndarray  # [PERIODS, v]: drawing weight of each item in each period, 0 before its birth
    birth: np.ndarray  # [v]: period of birth, negative when born before the log
    taste: np.ndarray  # [users, genres]: cumulative weights of the user's taste
    own_moods: np.ndarray  # [users, 2]
    next_genre: np.ndarray  # [genres]
    next_mood: np.ndarray  # [moods]
    centres: np.ndarray  # [genres, width]: latent position of each genre

    @property
    def num_genres(self) -> int:
        return len(self.next_genre)

    @property
    def num_moods(self) -> int:
        return len(self.next_mood)

    def genre_chances(self, users: np.ndarray, last: np.ndarray) -> np.ndarray:
        """float64 [n, genres]: probability of the next genre given users and their last items."""
        c, rows = self.chances, np.arange(len(users))
        taste = np.diff(self.taste[users].astype(np.int64), axis=1, prepend=0)
        stay, step = (x * (PARTS - c.fresh) / PARTS**2 for x in (c.stay, c.step))
        p = taste / taste.sum(1, keepdims=True) * (1 - stay - step)
        p[rows, self.genre[last]] += stay
        p[rows, self.next_genre[self.genre[last]]] += step
        return p

    def mood_chances(self, users: np.ndarray, last: np.ndarray, before: np.ndarray) -> np.ndarray:
        """float64 [n, moods]: probability of the next mood given the last item and the one before it."""
        c, rows = self.chances, np.arange(len(users))
        p = np.full((len(users), self.num_moods), (PARTS - c.follow - c.recall - c.habit) / PARTS / self.num_moods)
        p[rows, self.next_mood[self.mood[last]]] += c.follow / PARTS
        p[rows, self.next_mood[self.mood[before]]] += c.recall / PARTS
        for own in self.own_moods[users].T:
            p[rows, own] += c.habit / PARTS / 2
        return p

    def next_item(self, users: np.ndarray, last: np.ndarray, before: np.ndarray, period: np.ndarray) -> np.ndarray:
        """float64 [n, v]: probability of every next item, up to repeats: the best any model can know.

        Seen items must be removed by the caller; nothing is said about users with fewer than two events.
        """
        cells = self.genre_chances(users, last)[:, :, None] * self.mood_chances(users, last, before)[:, None, :]
        weight = self.weight[period].astype(np.float64)
        sums = np.diff(np.concatenate([np.zeros((len(users), 1)), weight.cumsum(1)], 1)[:, self.starts], axis=1)
        cell = self.genre * self.num_moods + self.mood
        inside = weight / np.maximum(sums, 1)[:, cell]
        stray = self.chances.stray / PARTS
        return cells.reshape(len(users), -1)[:, cell] * inside * (1 - stray) + stray * weight / weight.sum(1)[:, None]


def make_laws(
    seed: int, chances: Chances, *, users: int, items: int, genres: int, moods: int, width: int, zipf: int, fade: int
) -> Laws:
    """Draw the hidden laws. `zipf` is the exponent in sixteenths, `fade` the half-life of interest in days."""
    genre, mood = Stream(seed, 1).below(genres, items), Stream(seed, 2).below(moods, items)
    order = np.argsort(genre * moods + mood, kind="stable")
    genre, mood = genre[order], mood[order]
    rank = Stream(seed, 3).order(items)
    base = np.floor(65536 * power((rank + 9) / 9, -zipf)).astype(np.int64) + 1
    old, young = Stream(seed, 4).below(PERIODS // 2, items), Stream(seed, 5).below(PERIODS * 7 // 8, items)
    birth = np.where(Stream(seed, 6).below(2, items) == 0, -old, young)
    half = halving(_HALF_STEPS)
    age_days = np.maximum(np.arange(PERIODS)[:, None] - birth, 0) * (YEAR // DAY) // PERIODS
    life = np.maximum(half[np.minimum(age_days * _HALF_STEPS // fade, 4 * _HALF_STEPS)], 128)
    weight = np.where(np.arange(PERIODS)[:, None] < birth, 0, base * life // 1024 + 1)

    centres = Stream(seed, 7).below(15, genres * width).reshape(genres, width) - 7
    liking = (Stream(seed, 8).below(15, users * width).reshape(users, width) - 7) @ centres.T
    below_best = (liking.max(1, keepdims=True) - liking) * _HALF_STEPS // math.isqrt(36 * width)
    taste = np.where(below_best > 4 * _HALF_STEPS, 0, half[np.minimum(below_best, 4 * _HALF_STEPS)]) + 1
    return Laws(
        chances=chances,
        genre=genre,
        mood=mood,
        starts=np.searchsorted(genre * moods + mood, np.arange(genres * moods + 1)),
        weight=weight,
        birth=birth,
        taste=taste.cumsum(1).astype(np.int32),
        own_moods=Stream(seed, 9).below(moods, users * 2).reshape(users, 2),
        next_genre=_cycle(Stream(seed, 10).order(genres)),
        next_mood=_cycle(Stream(seed, 11).order(moods)),
        centres=centres,
    )


def _cycle(order: np.ndarray) -> np.ndarray:
    """The permutation that leads each entry of `order` to the one after it, so that nothing follows itself."""
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    return following


def history_lengths(seed: int, users: int, events: int) -> np.ndarray:
    """int64 [users], longest first: events of each user, skewed as in real logs, with `events` as their sum."""
    weight = (Stream(seed, 12).below(65536, users) * Stream(seed, 13).below(65536, users) >> 16) + 3072
    weight = np.where(Stream(seed, 14).below(16, users) == 0, 4 * weight, weight)
    weight = -np.sort(-weight)
    edges = weight.cumsum() * events // weight.sum()
    return -np.sort(-np.diff(edges, prepend=0))


@dataclass(frozen=True)
class Log:
    """Events user by user (in the order of `user_ids`), oldest first. Users and items are indices into `Laws`."""

    user: np.ndarray
    item: np.ndarray
    seconds: np.ndarray  # since the start of the world
    opens: np.ndarray  # whether the event starts a session


def make_ratings(seed: int, laws: Laws, log: Log) -> np.ndarray:
    """int64 [events]: 1 to 5, what the user thinks of the item: by genre and mood, and by chance.

    A genre gives 1 to 3, by its place in the user's taste, a mood of the user's own 1 more, and chance from -1 to 1.
    """
    taste = np.diff(laws.taste.astype(np.int64), axis=1, prepend=0)
    place = np.argsort(np.argsort(-taste, axis=1, kind="stable"), axis=1, kind="stable")[log.user, laws.genre[log.item]]
    likes = np.select([place == 0, 2 * place < laws.num_genres], [3, 2], 1)
    own = (laws.own_moods[log.user] == laws.mood[log.item][:, None]).any(1)
    return np.clip(likes + own + Stream(seed, 28).below(3, len(log.item)) - 1 + (likes > 1), 1, 5)


def user_ids(seed: int, users: int) -> np.ndarray:
    """int64 [users]: the id of each user, 1..users shuffled, because user 0 is the one with most events."""
    return Stream(seed, 17).order(users) + 1


def make_log(seed: int, laws: Laws, lengths: np.ndarray) -> Log:
    """Draw all events: step k makes the k-th event of every user who has that many."""
    draws, c = Stream(seed, 15), laws.chances
    users, steps = len(lengths), int(lengths.max())
    by_id = np.argsort(user_ids(seed, users))
    offsets = np.empty(users, np.int64)
    offsets[by_id] = lengths[by_id].cumsum() - lengths[by_id]
    log = Log(*(np.empty(lengths.sum(), t) for t in (np.int32, np.int32, np.int64, np.bool_)))
    clock = Stream(seed, 16).below(YEAR * 9 // 10, users)
    pause = np.maximum((YEAR - clock) * 3 * PARTS // (5 * (lengths * c.fresh + PARTS)), 1800)
    reach = np.concatenate([[0], laws.weight.ravel().cumsum()])
    past: list[np.ndarray] = []
    genre = np.zeros(users, np.int64)
    last_mood, mood_before = laws.own_moods[:, 0].copy(), laws.own_moods[:, 1].copy()
    for k in range(steps):
        n = int(np.searchsorted(-lengths, -k))  # users with more than k events come first
        opens = draws.below(PARTS, n) < (c.fresh if k else PARTS)
        clock[:n] += np.where(opens, draws.below(2 * pause[:n]), 20 + draws.below(600, n)) if k else 0
        period = np.minimum(clock[:n] * PERIODS // YEAR, PERIODS - 1)

        u = draws.below(PARTS, n)
        moves = np.where(u < c.stay, genre[:n], laws.next_genre[genre[:n]])
        by_taste = np.flatnonzero(opens | (u >= c.stay + c.step))
        moves[by_taste] = (laws.taste[by_taste] <= draws.below(laws.taste[by_taste, -1])[:, None]).sum(1)
        u, own = draws.below(PARTS, n), laws.own_moods[np.arange(n), draws.below(2, n)]
        mood = np.where(u < c.follow + c.recall + c.habit, own, draws.below(laws.num_moods, n))
        mood = np.where(u < c.follow + c.recall, laws.next_mood[mood_before[:n]], mood)
        mood = np.where(u < c.follow, laws.next_mood[last_mood[:n]], mood)

        stray = draws.below(PARTS, n) < c.stray
        cell = moves * laws.num_moods + mood
        item = _draw_items(draws, laws, reach, period, cell, stray, past)
        past.append(item)
        genre[:n], mood_before[:n], last_mood[:n] = laws.genre[item], last_mood[:n], laws.mood[item]
        at = offsets[:n] + k
        log.user[at], log.item[at], log.seconds[at], log.opens[at] = np.arange(n), item, clock[:n], opens
    return log


def _draw_items(
    draws: Stream, laws: Laws, reach: np.ndarray, period: np.ndarray, cell: np.ndarray, stray: np.ndarray, past: list
) -> np.ndarray:
    """One item for each user from their cell, by weight in the period; wider after repeats, then the repeat stands."""
    num_items, n = len(laws.genre), len(cell)
    item = np.zeros(n, np.int64)
    todo = np.arange(n)
    for attempt in range(_TRIES):
        first, end = laws.starts[cell[todo]], laws.starts[cell[todo] + 1]
        if attempt == _TRIES - 2:  # the genre
            rows = cell[todo] // laws.num_moods * laws.num_moods
            first, end = laws.starts[rows], laws.starts[rows + laws.num_moods]
        wide = stray[todo] if attempt < _TRIES - 1 else np.ones(len(todo), bool)
        first, end = np.where(wide, 0, first), np.where(wide, num_items, end)
        row = period[todo] * num_items
        low = reach[row + first]
        span = reach[row + end] - low
        drawn = np.searchsorted(reach, low + draws.below(np.maximum(span, 1)), side="right") - 1 - row
        repeat = span == 0
        for earlier in past:
            repeat |= earlier[todo] == drawn
        item[todo] = np.where(span > 0, drawn, item[todo])
        todo = todo[repeat]
        if not len(todo):
            break
    return item
