"""Ranking for a server: one thread encodes and calls the model, for all requests at once that came meanwhile.

Requests that wait while a call runs go through the next one together; a lone request waits for nobody. Rows do not
influence one another, so an answer does not depend on its company.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from recjax.serve.gate import busy, in_time
from recjax.serve.rank_bundle import SIZES, RankBundle
from recjax.serve.rank_request import RankQuestion


class _Waiting(NamedTuple):
    asked: RankQuestion
    answer: Future[dict[str, Any]]


class RankDesk:
    """The queue in front of one rank bundle."""

    def __init__(
        self,
        bundle: RankBundle,
        *,
        max_queue: int = 1024,
        timeout: float = 10.0,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """`on_batch(requests, seconds)` is told of every call."""
        self.bundle, self._max_queue, self._timeout, self._on_batch = bundle, max_queue, timeout, on_batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"recjax-{bundle.name}")
        self._queue: deque[_Waiting] = deque()

    async def rank(self, asked: RankQuestion) -> dict[str, Any]:
        """The answer to a question; raises `RequestError`, 503 when too many wait or it does not come in time."""
        self.bundle.check(asked)
        if len(self._queue) >= self._max_queue:
            raise busy()
        waiting = _Waiting(asked, Future())
        self._queue.append(waiting)
        self._thread.submit(self._work)
        return await in_time(asyncio.wrap_future(waiting.answer), self._timeout)

    def answers(self, asked: Sequence[RankQuestion]) -> list[dict[str, Any]]:
        """Candidates in order, best first by the head that a question names, with what every head says of each."""
        start = time.perf_counter()
        logits = self.bundle.logits(self.bundle.fields(asked))
        scores = self.bundle.scores(logits)
        self._on_batch(len(asked), time.perf_counter() - start)
        ends = np.cumsum([len(one.candidates) for one in asked])[:-1]
        return [
            self._described(*each) for each in zip(asked, np.split(logits, ends), np.split(scores, ends), strict=True)
        ]

    def warm_up(self) -> int:
        """Compile every shape; returns how many."""
        return self.bundle.warm_up()

    async def start(self) -> None:
        """Nothing to do: the thread waits for work."""

    async def stop(self) -> None:
        """Finish what waits."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def facts(self) -> dict[str, Any]:
        """What is served: heads, the columns that are read, and which of them a request may leave to the log."""
        told, features = self.bundle.manifest, self.bundle.features
        heads = {
            name: {fact: head[fact] for fact in ("rule", "rate", "form") if fact in head}
            for name, head in self.bundle.heads.items()
        }
        named = {name: told[name] for name in ("name", "recipe", "step", "created")}
        nothing = {"recommends": False, "searches": False, "max_k": 0, "facets": {}, "sample_users": 0}
        return {
            **named,
            **nothing,
            "ranks": True,
            "heads": heads,
            "columns": dict(self.bundle.columns.kinds),
            "remembered": {name: list(on) for name, on in features.remembered.items()},
            "log": told.get("log"),
        }

    def _work(self) -> None:
        """Answer as many of those who wait as go through the model in one call."""
        taken, rows = [], 0
        while self._queue and (not taken or rows + len(self._queue[0].asked.candidates) <= SIZES[-1]):
            waiting = self._queue.popleft()
            if waiting.answer.set_running_or_notify_cancel():
                taken.append(waiting)
                rows += len(waiting.asked.candidates)
        if not taken:
            return
        try:
            answers = self.answers([waiting.asked for waiting in taken])
        except BaseException as error:  # the requests of this call fail, the server goes on
            for waiting in taken:
                waiting.answer.set_exception(error)
            return
        for waiting, answer in zip(taken, answers, strict=True):
            waiting.answer.set_result(answer)

    def _described(self, asked: RankQuestion, logits: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        heads = list(self.bundle.heads)
        head = asked.head or heads[0]
        order = np.argsort(-logits[:, heads.index(head)], kind="stable")[: asked.k]
        ranked = [
            {"candidate": at, "scores": dict(zip(heads, said, strict=True))}
            for at, said in zip(order.tolist(), scores[order].tolist(), strict=True)
        ]
        return {
            "ranked": ranked,
            "head": head,
            "from_log": self._from_log(asked),
            "model": self.bundle.name,
            "step": self.bundle.manifest["step"],
        }

    def _from_log(self, asked: RankQuestion) -> list[str]:
        """The columns of counters and histories that some candidate has from the end of the log."""
        return [
            name
            for name in self.bundle.features.remembered
            if name not in asked.context and not all(name in row for row in asked.candidates)
        ]
