"""The queue in front of a bundle: many requests answered with few calls of the model, each in time.

Requests wait for at most `max_wait` seconds (none at all while the previous call was running that long) and go through
the model together, as many as one call has room for. One thread runs the model; the event loop never waits for it.
Whoever would wait longer than `timeout` seconds is turned away at once, and whoever has is no longer computed. What
the requests of a call have in common, and what is answered, is the matter of each kind of bundle: `recjax.serve`
has an item, a score and a rank desk.
"""

from __future__ import annotations

import abc
import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

from recjax.serve.gate import busy, in_time
from recjax.serve.stored import Stored

B = TypeVar("B", bound=Stored)
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class _Waiting(NamedTuple):
    asked: Any
    since: float
    answer: asyncio.Future[Any]


class Desk(abc.ABC, Generic[B, Asked, Answer]):
    """Whoever answers for one bundle. `start`, `ask` and `stop` are called by the server's event loop."""

    def __init__(
        self,
        bundle: B,
        *,
        room: int,
        max_wait: float = 0.0,
        max_queue: int = 1024,
        timeout: float = 10.0,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """`room` is what fits into one call, in `size_of` requests; `on_batch(requests, seconds)` is told of each."""
        self.bundle = bundle
        self._room, self._max_wait, self._max_queue, self._timeout = room, max_wait, max_queue, timeout
        self._on_batch = on_batch
        self._call_seconds = 0.0  # of late
        self._queue: deque[_Waiting] = deque()
        self._queued = 0  # their sizes together
        self._news, self._closing = asyncio.Event(), False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"recjax-{bundle.name}")
        self._task: asyncio.Task[None] | None = None

    @abc.abstractmethod
    def answers(self, asked: Sequence[Asked]) -> Sequence[Answer]:
        """What the model says to the requests of one call; called in its thread."""

    @abc.abstractmethod
    def warm_up(self) -> int:
        """Compile every shape that requests can have, so that none of them waits for it; returns how many."""

    def size_of(self, asked: Asked) -> int:
        """How much room a request takes."""
        return 1

    async def ask(self, asked: Asked) -> Answer:
        """Wait for the answer to one request.

        Raises `RequestError` 503 when the queue is full or so long that the answer would come too late, and when it
        has not come in time.
        """
        late = self._queued / self._room * self._call_seconds > self._timeout
        if late or len(self._queue) >= self._max_queue:
            raise busy()
        waiting = _Waiting(asked, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._queued += self.size_of(asked)
        self._news.set()
        return await in_time(waiting.answer, self._timeout)

    async def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Answer what waits, then stop."""
        self._closing = True
        self._news.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._collect():
            live = [waiting for waiting in batch if not waiting.answer.cancelled()]
            try:
                answers = await loop.run_in_executor(self._thread, self._run, live) if live else []
            except Exception as error:  # the requests of this call fail, the server goes on
                for waiting in live:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
            else:
                for waiting, answer in zip(live, answers, strict=True):
                    if not waiting.answer.cancelled():
                        waiting.answer.set_result(answer)

    async def _collect(self) -> list[_Waiting]:
        """Whoever waits, and whoever comes until the first has waited `max_wait`; nobody at the end."""
        while not self._queue and not self._closing:
            self._news.clear()
            await self._news.wait()
        batch: list[_Waiting] = []
        room = self._room
        while room > 0 and (self._queue or (batch and await self._comes(batch[0].since + self._max_wait))):
            size = self.size_of(self._queue[0].asked)
            if batch and size > room:
                break
            batch.append(self._queue.popleft())
            self._queued -= size
            room -= size
        return batch

    async def _comes(self, until: float) -> bool:
        """Whether anyone comes before that time."""
        left = until - time.perf_counter()
        if left <= 0 or self._closing:
            return False
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), left)
        except TimeoutError:
            pass
        return bool(self._queue)

    def _run(self, batch: list[_Waiting]) -> Sequence[Answer]:
        start = time.perf_counter()
        answers = self.answers([waiting.asked for waiting in batch])
        seconds = time.perf_counter() - start
        self._call_seconds += 0.2 * (seconds - self._call_seconds)
        self._on_batch(len(batch), seconds)
        return answers
