"""Answering many requests with few calls of the model.

Requests wait in a queue for at most `max_wait` seconds (none at all while the previous call was running that long)
and go through the model together, histories and queries, with and without filters. Batches are filled up to powers of
two and seen items to one of two widths, so that only a handful of shapes is ever compiled, all of them by `warm_up`;
batches in which someone filters take one of two sizes. One thread runs the model; the event loop
never waits for it. Whoever would wait longer than `timeout` seconds is turned away at once, and whoever has is no
longer computed. Rows do not influence one another, so an answer does not depend on its company.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from recjax.serve.bundle import Bundle
from recjax.serve.features import Encoded, pad, pad_times
from recjax.serve.gate import busy, in_time
from recjax.serve.request import MAX_HISTORY

SEEN = 256  # seen items of most requests; more of them take the widest shape, in two batch sizes only


class Answer(NamedTuple):
    """Scores and rows of one request, `max_k` of each, best first."""

    scores: np.ndarray
    rows: np.ndarray


class _Waiting(NamedTuple):
    encoded: Encoded
    exclude_seen: bool
    allowed: np.ndarray | None
    since: float
    answer: asyncio.Future[Answer]


class Batcher:
    """The queue in front of one bundle. `start` and `stop` are called by the server's event loop."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch: int = 32,
        max_wait: float = 0.002,
        max_queue: int = 1024,
        timeout: float = 10.0,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """`max_batch` is rounded up to a power of two; `on_batch(size, seconds)` is told of every call."""
        self.bundle = self._bundle = bundle
        self._max_wait, self._timeout, self._on_batch = max_wait, timeout, on_batch
        self._call_seconds = 0.0  # of late
        self._max_batch = power_of_two(max_batch)
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"recjax-{bundle.name}")
        self._task: asyncio.Task[None] | None = None

    def warm_up(self) -> int:
        """Compile every shape that requests can have, so that none of them waits for it; returns how many."""
        each = itertools.product(range(1, self._max_batch + 1), (SEEN, MAX_HISTORY), {False, self._bundle.filters})
        shapes = {(*self._shape(count, seen, filtered), filtered) for count, seen, filtered in each}
        for count, width, filtered in sorted(shapes):
            length = self._bundle.prompt_length
            times = pad_times([], self._bundle.times, count=count, width=length)
            some = {"allowed": np.ones((count, self._bundle.vocab.num_rows), bool)} if filtered else {}
            history, seen = pad([], count=count, width=length), pad([], count=count, width=width)
            self._bundle.recommend(history, seen, *times, **some)
        return len(shapes)

    def facts(self) -> dict[str, Any]:
        """What is served."""
        return self._bundle.facts()

    async def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Answer what waits, then stop."""
        await self._queue.join()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    async def submit(self, encoded: Encoded, *, exclude_seen: bool = True, allowed: np.ndarray | None = None) -> Answer:
        """Wait for the answer to one request; `allowed` bool [rows] are the items that may come out, all when None.

        Raises `RequestError` 503 when the queue is full or so long that the answer would come too late, and when it
        has not come in time.
        """
        if self._queue.qsize() / self._max_batch * self._call_seconds > self._timeout:
            raise busy()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait(_Waiting(encoded, exclude_seen, allowed, time.perf_counter(), answer))
        except asyncio.QueueFull:
            raise busy() from None
        return await in_time(answer, self._timeout)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            live = [w for w in batch if not w.answer.cancelled()]
            try:
                answers = await loop.run_in_executor(self._thread, self._run, live) if live else []
                for waiting, answer in zip(live, answers, strict=True):
                    if not waiting.answer.cancelled():
                        waiting.answer.set_result(answer)
            except Exception as error:  # the requests of this batch fail, the server goes on
                for waiting in live:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
            finally:
                for _ in batch:
                    self._queue.task_done()

    async def _collect(self) -> list[_Waiting]:
        """Whoever waits, and whoever comes until the first has waited `max_wait`, up to a full batch."""
        batch = [await self._queue.get()]
        while len(batch) < self._max_batch:
            if self._queue.empty():
                left = batch[0].since + self._max_wait - time.perf_counter()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        return batch

    def _run(self, batch: list[_Waiting]) -> list[Answer]:
        start = time.perf_counter()
        seen = [w.encoded.seen_ids if w.exclude_seen else w.encoded.seen_ids[:0] for w in batch]
        filtered = any(w.allowed is not None for w in batch)
        count, width = self._shape(len(batch), max(len(ids) for ids in seen), filtered)
        length = self._bundle.prompt_length
        scores, rows = self._bundle.recommend(
            pad([w.encoded.history_ids for w in batch], count=count, width=length),
            pad(seen, count=count, width=width),
            *pad_times([w.encoded for w in batch], self._bundle.times, count=count, width=length),
            **({"allowed": self._allowed(batch, count)} if filtered else {}),
        )
        seconds = time.perf_counter() - start
        self._call_seconds += 0.2 * (seconds - self._call_seconds)
        self._on_batch(len(batch), seconds)
        return [Answer(scores[i], rows[i]) for i in range(len(batch))]

    def _allowed(self, batch: list[_Waiting], count: int) -> np.ndarray:
        """bool [count, rows]: the items that may come out for each request."""
        allowed = np.ones((count, self._bundle.vocab.num_rows), bool)
        for i, waiting in enumerate(batch):
            if waiting.allowed is not None:
                allowed[i] = waiting.allowed
        return allowed

    def _shape(self, count: int, seen: int, filtered: bool) -> tuple[int, int]:
        """Batch rows and width of the seen items for `count` requests with at most `seen` each."""
        few = 1 if count == 1 else self._max_batch
        if seen <= SEEN:
            return few if filtered else power_of_two(count), SEEN
        return few, MAX_HISTORY


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
