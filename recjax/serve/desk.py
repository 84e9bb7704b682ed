"""Scoring for a server: one thread calls the model, so many requests wait for it, and answers are put into words.

A request is a batch by itself (a prompt and its candidates), so requests are not put together as those of
`recjax.serve.batching` are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from recjax.serve.gate import busy, in_time
from recjax.serve.score_bundle import ScoreBundle
from recjax.serve.score_request import ScoreQuestion


class Desk:
    """The queue in front of one score bundle."""

    def __init__(
        self,
        bundle: ScoreBundle,
        *,
        max_queue: int = 1024,
        timeout: float = 10.0,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """`on_batch(candidates, seconds)` is told of every call."""
        self.bundle, self._max_queue, self._timeout, self._on_batch = bundle, max_queue, timeout, on_batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"recjax-{bundle.name}")
        self._waiting = 0

    async def score(self, asked: ScoreQuestion) -> dict[str, Any]:
        """The answer to a question; raises `RequestError`, 503 when too many wait or it does not come in time."""
        if self._waiting >= self._max_queue:
            raise busy()
        self._waiting += 1
        try:
            call = asyncio.get_running_loop().run_in_executor(self._thread, self.answer, asked)
            return await in_time(call, self._timeout)
        finally:
            self._waiting -= 1

    def answer(self, asked: ScoreQuestion) -> dict[str, Any]:
        """Probabilities of the label words for each candidate, and with two of them the `score` to rank by."""
        start = time.perf_counter()
        bundle, task = self.bundle, self.bundle.task(asked.task)
        prompt, prefix, suffixes = bundle.rows(asked)
        probabilities = task.answers(bundle.logits(prefix, suffixes))
        self._on_batch(len(suffixes), time.perf_counter() - start)
        return {
            "scores": [_described(task.label_words, p) for p in probabilities],
            "task": task.name,
            "events_read": prompt.events,
            "tokens": len(prefix) + sum(map(len, suffixes)),
            "model": bundle.name,
            "step": bundle.manifest["step"],
        }

    def facts(self) -> dict[str, Any]:
        """What is served, with all that is said of other bundles."""
        told = self.bundle.manifest
        tasks = {
            task.name: {
                "label_words": list(task.label_words),
                "instruction": list(task.fields["instruction"]),
                "candidate": list(task.fields["question"]),
                "history": task.tells_history,
            }
            for task in self.bundle.tasks.values()
        }
        named = {name: told[name] for name in ("name", "recipe", "step", "created")}
        nothing = {"recommends": False, "searches": False, "max_k": 0, "facets": {}, "sample_users": 0}
        return {**named, **nothing, "scores": True, "tasks": tasks}

    def warm_up(self) -> int:
        """Compile every shape; returns how many."""
        return self.bundle.warm_up()

    async def start(self) -> None:
        """Nothing to do: the thread waits for work."""

    async def stop(self) -> None:
        """Finish what waits."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)


def _described(words: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"probabilities": dict(zip(words, probabilities.tolist(), strict=True))}
    return {"score": float(probabilities[1]), **found} if len(words) == 2 else found
