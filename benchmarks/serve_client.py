"""A client that costs little beside the server it measures, and the answers that the server has to give.

One keep-alive connection at a time over asyncio's streams. A connection that the server closes without an answer is
`LOST`, which a server under any load must not do.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from serve_fuzz import Asked, Known

from recjax.serve.bundle import Bundle
from recjax.serve.features import pad, pad_times
from recjax.serve.request import DEFAULT_K

LOST = 0  # in place of a status
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back; `seconds` from sending to the last byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


class Connection:
    """A connection to `host:port`, opened when needed and again after the server has closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, asked: Asked) -> Reply:
        """Send a request and wait for its answer."""
        head = f"{asked.method} {asked.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        raw = f"{head}content-length: {len(asked.body)}\r\n\r\n".encode("latin-1") + asked.body
        start = time.perf_counter()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._where)
            reader, writer = self._streams
            writer.write(raw)
            status, headers, body = await self._read(reader, asked.method == "HEAD")
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return Reply(LOST, {}, b"", time.perf_counter() - start)
        if headers.get("connection") == "close":
            self.close()
        return Reply(status, headers, body, time.perf_counter() - start)

    async def _read(self, reader: asyncio.StreamReader, bare: bool) -> tuple[int, dict[str, str], bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b"" if bare else await reader.readexactly(int(headers.get("content-length", 0)))
        return int(first.split()[1]), headers, body

    def close(self) -> None:
        """Give the connection up."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def drive(
    host: str,
    port: int,
    requests: Callable[[], Asked],
    *,
    connections: int,
    count: int = 0,
    seconds: float = 0.0,
    rate: float = 0.0,
    check: Callable[[Asked, Reply], None] = lambda asked, reply: None,
) -> list[Reply]:
    """Ask until `count` or `seconds` are over, on `connections` at once; at `rate` a second, or as fast as it goes."""
    replies: list[Reply] = []
    start, sent = time.perf_counter(), 0

    async def one() -> None:
        nonlocal sent
        connection = Connection(host, port)
        while (not count or sent < count) and (not seconds or time.perf_counter() - start < seconds):
            sent += 1
            if rate:
                await asyncio.sleep(max(0.0, start + sent / rate - time.perf_counter()))
            asked = requests()
            reply = await connection.ask(asked)
            replies.append(reply)
            check(asked, reply)
        connection.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return replies


class Truth:
    """What the bundles in this process answer; `wrong` lists what a server said otherwise."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        """`bundles` are the versions that may answer, told apart by their step."""
        self._bundles = {bundle.manifest["step"]: bundle for bundle in bundles}
        self._cache: dict[tuple[int, bytes], list[tuple[Any, float]]] = {}
        self.wrong: list[str] = []
        self.checked = 0
        self.by_step: collections.Counter[int] = collections.Counter()

    def check(self, asked: Asked, reply: Reply) -> None:
        """Hold an answer against what the bundle says; a right question must have been answered or put off."""
        if asked.question is None:
            return
        if reply.status == 200:
            answer = json.loads(reply.body)
            self.by_step[answer["step"]] += 1
            self._compare(asked, answer)
        elif reply.status not in (503, LOST):
            self.wrong.append(f"{reply.status} for {asked.body[:200]!r}: {reply.body[:200]!r}")

    def _compare(self, asked: Asked, answer: dict[str, Any]) -> None:
        self.checked += 1
        question = asked.question or {}
        expected, k = self._expected(answer["step"], asked), question.get("k", DEFAULT_K)
        got = [(item["item_id"], item["score"]) for item in answer["items"]]
        scores = [score for _, score in expected[:k]]
        if len(got) != len(scores) or not np.allclose([s for _, s in got], scores, **TOLERANCE):
            self.wrong.append(f"{asked.path} {asked.body[:200]!r}: {got[:3]} instead of {expected[:3]}")
            return
        known = dict(expected)
        for (item, score), (wanted, _) in zip(got, expected, strict=False):
            # Equal scores may change places, also with one that is not among those shown.
            near = known.get(item, expected[-1][1])
            if item != wanted and not np.isclose(score, near, **TOLERANCE):
                self.wrong.append(f"{asked.path} {asked.body[:200]!r}: {item} at {score} instead of {wanted}")

    def _expected(self, step: int, asked: Asked) -> list[tuple[Any, float]]:
        if (step, asked.body) not in self._cache:
            bundle, question = self._bundles[step], asked.question or {}
            if "query" in question:
                user = bundle.encode_query(question["query"])
            else:
                user = bundle.encode(question["user_history"], question.get("history_time"), question.get("time"))
            facets = {name: [v] if isinstance(v, str) else v for name, v in question.get("filter", {}).items()}
            allowed = bundle.allowed(facets)
            seen = user.seen_ids if question.get("exclude_seen", True) else user.seen_ids[:0]
            scores, rows = bundle.recommend(
                pad([user.history_ids], count=1, width=bundle.prompt_length),
                pad([seen], count=1, width=512),
                *pad_times([user], bundle.times, count=1, width=bundle.prompt_length),
                **({} if allowed is None else {"allowed": allowed[None]}),
            )
            there = np.isfinite(scores[0])
            ids = bundle.vocab.decode(rows[0][there])
            self._cache[step, asked.body] = list(zip(ids, scores[0][there].tolist(), strict=True))
        return self._cache[step, asked.body]


def known_of(bundle: Bundle) -> Known:
    """What can be asked of a bundle: all of its items, words of their titles, its facets."""
    ids = bundle.vocab.decode(np.flatnonzero(bundle.vocab.valid))
    words = sorted({word for title in bundle.titles if title for word in title.split()}) or ["item"]
    return Known(ids, words, bundle.facets.shown(), bundle.max_k)


def paths_of(bundle: Bundle) -> list[str]:
    """Where its questions go."""
    from recjax.serve.app import RECOMMEND, SEARCH

    return [path for path, can in ((RECOMMEND, bundle.recommends), (SEARCH, bundle.searches)) if can]
