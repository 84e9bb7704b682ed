"""The door: who comes to a full house is turned away unread, bodies must come in time, nothing goes uncounted."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from recjax.core.errors import RequestError
from recjax.serve.gate import Gate, in_time, read
from recjax.serve.metrics import Metrics


def scope(path="/work"):
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}


async def call(app, path="/work", receive=None):
    """The status and headers of one answer."""
    sent = []

    async def send(message):
        sent.append(message)

    async def nothing():
        raise AssertionError("the request was read")

    await app(scope(path), receive or nothing, send)
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def gate(app, limit=2):
    metrics = Metrics()
    return Gate(app, metrics=metrics, paths=["/work", "/health"], limited=["/work"], limit=limit), metrics


def test_a_full_house_turns_away_without_reading_and_keeps_answering_what_is_free():
    entered, leave = [], asyncio.Event()

    async def app(scope, receive, send):
        entered.append(scope["path"])
        if scope["path"] == "/work":
            await leave.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    async def work():
        door, metrics = gate(app)
        inside = [asyncio.create_task(call(door)) for _ in range(2)]
        await asyncio.sleep(0)
        status, headers = await call(door)
        assert (status, headers["retry-after"]) == (503, "1") and entered == ["/work"] * 2
        assert (await call(door, "/health"))[0] == 200
        leave.set()
        assert [(await task)[0] for task in inside] == [200, 200]
        assert (await call(door))[0] == 200
        return metrics.text().decode()

    text = asyncio.run(work())
    assert 'recjax_requests_total{path="/work",status="503"} 1.0' in text
    assert 'recjax_requests_total{path="/work",status="200"} 3.0' in text


def test_whatever_fails_leaves_and_is_a_500_with_a_reason():
    async def app(scope, receive, send):
        raise RuntimeError("broken")

    async def work():
        door, metrics = gate(app, limit=1)
        return [(await call(door))[0] for _ in range(3)], metrics.text().decode()

    statuses, text = asyncio.run(work())
    assert statuses == [500] * 3 and 'status="500"} 3.0' in text


def body_in(chunks, *, seconds=0.0):
    """A receive that gives chunks, one every some seconds."""
    left = list(chunks)

    async def receive():
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return Request(scope(), receive)


def test_bodies_are_read_whole_and_refused_when_long_or_slow():
    async def work():
        assert await read(body_in([b"ab", b"", b"c"]), limit=3, timeout=1.0) == b"abc"
        for request, status in ((body_in([b"ab", b"cd"]), 413), (body_in([b"a"] * 3, seconds=0.2), 408)):
            with pytest.raises(RequestError) as refused:
                await read(request, limit=3, timeout=0.1)
            assert refused.value.status == status

    asyncio.run(work())


def test_waiting_has_an_end_and_answers_pass():
    async def work():
        assert await in_time(asyncio.sleep(0, "answer"), 1.0) == "answer"
        with pytest.raises(RequestError, match="within 0.01 s") as refused:
            await in_time(asyncio.sleep(5), 0.01)
        return refused.value.status

    assert asyncio.run(work()) == 503
