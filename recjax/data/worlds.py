"""Three simulated worlds that ask when search helps recommendation and the other way round (Penha et al., RecSys 2024).

    PopularityShift   S1: nothing predicts an item but its popularity, which differs between the tasks and the test
    SharedQueries     S2: a share `rho` of the held-out next items answers a query together with the item before
    SharedHistories   S3: a share `rho` of the held-out answers occurs in histories together with a trained answer

Each has a knob, and `measured` counts what came of it in the events and pairs that were made. Train, valid and test
are given by columns split (`NextItem.split` and `Search.split` "given"); the catalogue is all items. A target of S1 may
be in the history, so seen items are to stay in the ranking there. In S2 and S3 all items are equally often a target of
training, up to one, and a query is a mood and the name of a topic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data import lexicon
from recjax.data.draws import Stream, power
from recjax.data.rated_world import RatedWorld
from recjax.data.small_world import TEST, TRAIN, VALID, Made, SmallWorld, check_limits
from recjax.data.surface_world import SurfaceWorld
from recjax.data.world_parts import bell, compacted, deck, kl, shares, tilted

_Log = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class PopularityShift(SmallWorld):
    """S1: items of the log are drawn from P_R, answers of queries from P_S, all held-out items from P_T.

    The knobs are `kl_rec` = KL(P_T || P_R) and `kl_search` = KL(P_T || P_S) in nats. P_T follows a power law of the
    exponent `zipf` sixteenths; the others tilt it at random, with `agreement` (-1 to 1) as the correlation of the two
    tilts: with 1 their errors add up in a mixture, with -1 they cancel. Joint training is predicted to win exactly
    where KL(P_T || (P_R + P_S) / 2) is below that of the task alone.
    """

    kl_rec: float = 0.5
    kl_search: float = 0.1
    agreement: float = 0.0
    zipf: int = 12
    users: int = 2000
    events: int = 10  # of each user, in training; the queries are as many as there are targets among them
    held_out: int = 500  # of each task and split
    kind: ClassVar[str] = "popularity_shift"

    def __post_init__(self) -> None:
        check_limits(self, kl_rec=(0, 20), kl_search=(0, 20), agreement=(-1, 1), events=(2, 10**4), users=(1, 10**7))
        check_limits(self, items=(2, 10**6), held_out=(1, self.users // 2))

    @property
    def draws(self) -> tuple[int, int]:
        """Training events, training pairs."""
        return self.users * self.events, self.users * (self.events - 1)

    def distributions(self) -> dict[str, np.ndarray]:
        """float64 [items]: "test", "rec" and "search"."""
        test = power((np.arange(self.items) + 10.0) / 10.0, -self.zipf)
        test /= test.sum()
        one, other = (bell(Stream(self.seed, 110 + k), self.items) for k in range(2))
        other = self.agreement * one + np.sqrt(1 - self.agreement**2) * other
        tilts = {"rec": (one, self.kl_rec), "search": (other, self.kl_search)}
        found = {n: tilted(test, *tilts[n], draws=d) for n, d in zip(tilts, self.draws, strict=True)}
        return {"test": test, **found}

    def make(self) -> Made:
        """Draw the events and pairs."""
        p = self.distributions()
        parts = ("rec", self.draws[0], 120), ("search", self.draws[1], 121)
        seen, answer = (deck(p[name], size, Stream(self.seed, k)) for name, size, k in parts)
        held = deck(p["test"], 4 * self.held_out, Stream(self.seed, 122)).reshape(4, self.held_out)
        last = np.full((self.users, 1), -1, np.int64)
        last[: 2 * self.held_out, 0] = np.concatenate(held[:2])
        user, item = compacted(np.concatenate([seen.reshape(self.users, -1), last], axis=1))
        part = np.zeros(len(user), np.int64)
        ends = np.flatnonzero(np.append(user[1:] != user[:-1], True))[: 2 * self.held_out]
        part[ends] = np.repeat([VALID, TEST], self.held_out)
        count = self.draws[1] + 2 * self.held_out
        asked = np.repeat([TRAIN, VALID, TEST], [self.draws[1], self.held_out, self.held_out])
        texts = [lexicon.name(k).lower() for k in range(count)]
        return Made(user, item, part, texts, np.arange(count), np.concatenate([answer, *held[2:]]), asked)

    def measured(self, made: Made) -> dict[str, Any]:
        """KL(P_T || training counts) of each task and of both in equal parts, and whom joint training should help."""
        test = self.distributions()["test"]
        rec, search = (
            shares(items[part == TRAIN], self.items)
            for items, part in ((made.item, made.part), (made.answer, made.asked))
        )
        found = {"kl_rec": kl(test, rec), "kl_search": kl(test, search), "kl_joint": kl(test, (rec + search) / 2)}
        helped = {f"joint_helps_{task}": found["kl_joint"] < found[f"kl_{task}"] for task in ("rec", "search")}
        return {**{name: round(value, 6) for name, value in found.items()}, **helped}


@dataclass(frozen=True, kw_only=True)
class _Pairs(SmallWorld):
    """Items 2i and 2i + 1 are pair i. `anchors` of the pairs show in both tasks that pairs belong together; the others
    are held out, half of them for valid: what the other task says of `rho` of them is true, of the rest false.

    Histories are of two items. Random ones between them would be learned by heart, which hid the effect (an earlier
    version of these worlds).
    """

    rho: float = 0.5
    anchors: float = 0.5
    repeats: int = 10  # how often every item is a training target of the log
    queries: int = 3  # of a topic with two answers

    def __post_init__(self) -> None:
        check_limits(self, items=(16, 10**6), rho=(0, 1), anchors=(0.1, 0.9), repeats=(1, 10**4))
        check_limits(self, queries=(2, lexicon.MAX_MOODS // 2))
        if self.items % 2:
            raise ConfigError(f"{self.items} items are no pairs", expected="an even number")

    def parts(self) -> np.ndarray:
        """int [pairs]: TRAIN for anchors, else the split that the pair is held out for."""
        pairs = self.items // 2
        held = pairs - round(self.anchors * pairs)
        return np.repeat([TRAIN, VALID, TEST], [pairs - held, held // 2, held - held // 2])

    def told(self) -> np.ndarray:
        """int [pairs, 2]: the items that the other task ties together: pairs, or wrong ones where it is false."""
        pairs, part = np.arange(self.items).reshape(-1, 2), self.parts()
        for split in (VALID, TEST):
            mine = np.flatnonzero(part == split)
            false = mine[round(self.rho * len(mine)) :]
            pairs[false, 1] = np.roll(pairs[false, 1], 1)
        return pairs

    def _texts(self, each: np.ndarray) -> tuple[list[str], np.ndarray]:
        """So many queries about every topic, and the topic of each: a mood and the topic's name."""
        moods = Stream(self.seed, 130).order(lexicon.MAX_MOODS)
        topics = np.repeat(np.arange(len(each)), each)
        number = np.arange(len(topics)) - np.repeat(np.cumsum(each) - each, each)
        words = zip(moods[number].tolist(), topics.tolist(), strict=True)
        return [f"{lexicon.MOODS[mood]} {lexicon.name(topic).lower()}" for mood, topic in words], topics

    def _log(self, histories: np.ndarray, questions: np.ndarray, part: np.ndarray) -> _Log:
        """User, item and part of all events: histories of training, and such that end in a held-out item of `part`."""
        rows = np.full((len(histories) + len(questions), 3), -1, np.int64)
        rows[: len(histories), :2] = histories
        rows[len(histories) :, 3 - questions.shape[1] :] = questions
        held = np.zeros(rows.shape, np.int64)
        held[len(histories) :, -1] = part
        order = Stream(self.seed, 131).order(len(rows))
        user, item = compacted(rows[order])
        return user, item, held[order][rows[order] >= 0]


@dataclass(frozen=True, kw_only=True)
class SharedQueries(_Pairs):
    """S2: of the held-out next items, a share `rho` answers queries together with the item before it.

    Histories show one item of an anchor after the other. The items of held-out pairs come after an item of any anchor,
    and nothing comes after them before the held-out item does.
    """

    kind: ClassVar[str] = "shared_queries"

    def make(self) -> Made:
        """Draw the events and pairs."""
        pairs, part = np.arange(self.items).reshape(-1, 2), self.parts()
        held = part != TRAIN
        last = np.repeat(pairs[held].reshape(-1), self.repeats)
        first = np.resize(pairs[~held].reshape(-1), len(last))[Stream(self.seed, 132).order(len(last))]
        after = np.stack([first, last], axis=1)
        asks = np.arange(len(after)) % self.repeats == 0  # one history of each item goes on with the held-out one
        questions = np.concatenate([after[asks], after[asks][:, 1:] ^ 1], axis=1)
        histories = np.concatenate([_both_ways(pairs[~held], self.repeats), after[~asks]])
        log = self._log(histories, questions, np.repeat(part[held], 2))
        texts, topic = self._texts(np.full(len(pairs), self.queries))
        query, answer = np.repeat(np.arange(len(texts)), 2), self.told()[topic].reshape(-1)
        # Held-out search, so that there is one: an answer of the last query about each anchor.
        asked = np.zeros(len(query), np.int64)
        final = 2 * (np.arange(int((~held).sum())) * self.queries + self.queries - 1)
        asked[final + np.arange(len(final)) % 2] = np.where(np.arange(len(final)) // 2 % 2, VALID, TEST)
        return Made(*log, texts, query, answer, asked)

    def measured(self, made: Made) -> dict[str, Any]:
        """`rho`: of the test targets, the share that answers a trained query together with the item before."""
        train = made.asked == TRAIN
        queries = _sets(made.answer[train], made.query[train])
        targets = np.flatnonzero(made.part == TEST)
        shared = [
            bool(queries[before] & queries[item])
            for before, item in zip(made.item[targets - 1].tolist(), made.item[targets].tolist(), strict=True)
        ]
        return {"rho": round(float(np.mean(shared)), 6), "targets": len(shared)}


@dataclass(frozen=True, kw_only=True)
class SharedHistories(_Pairs):
    """S3: of the held-out answers, a share `rho` occurs in histories together with a trained answer of the query.

    Queries about anchors have both items of the pair as answers, queries about others the one item they are about; the
    other item is held out.
    """

    kind: ClassVar[str] = "shared_histories"

    def make(self) -> Made:
        """Draw the events and pairs."""
        pairs, part = np.arange(self.items).reshape(-1, 2), self.parts()
        # Held-out recommendation, so that there is some: one item of an anchor after the other.
        questions = pairs[part == TRAIN]
        number = np.arange(len(questions))
        questions = np.where(number[:, None] % 2, questions, questions[:, ::-1])
        log = self._log(_both_ways(self.told(), self.repeats), questions, np.where(number // 2 % 2, VALID, TEST))
        split = np.repeat(part, 2)  # of every item
        each = np.where(split == TRAIN, self.queries, 2 * self.queries)  # those about anchors have two answers
        texts, topic = self._texts(each)
        both, first = np.flatnonzero(split[topic] == TRAIN), (np.cumsum(each) - each)[split != TRAIN]
        query = np.concatenate([np.arange(len(texts)), both, first])
        answer = np.concatenate([topic, topic[both] ^ 1, topic[first] ^ 1])
        asked = np.concatenate([np.zeros(len(texts) + len(both), np.int64), split[topic[first]]])
        return Made(*log, texts, query, answer, asked)

    def measured(self, made: Made) -> dict[str, Any]:
        """`rho`: of the test answers, the share that is in a training history with a trained answer of the query."""
        train, shown = made.asked == TRAIN, made.part == TRAIN
        answers = _sets(made.query[train], made.answer[train])
        users = _sets(made.item[shown], made.user[shown])
        test = made.asked == TEST
        together = [
            any(users[item] & users[other] for other in answers[query])
            for query, item in zip(made.query[test].tolist(), made.answer[test].tolist(), strict=True)
        ]
        return {"rho": round(float(np.mean(together)), 6), "targets": len(together)}


def _both_ways(pairs: np.ndarray, repeats: int) -> np.ndarray:
    return np.repeat(np.concatenate([pairs, pairs[:, ::-1]]), repeats, axis=0)


def _sets(keys: np.ndarray, values: np.ndarray) -> dict[int, set[int]]:
    """The values of each key."""
    found: dict[int, set[int]] = {}
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        found.setdefault(key, set()).add(value)
    return found


WORLDS: Mapping[str, type[SmallWorld]] = {
    w.kind: w for w in (PopularityShift, SharedQueries, SharedHistories, RatedWorld, SurfaceWorld)
}
