"""The door of a server: how many requests are inside, how long each may take, what is counted and what is sent back.

Whoever comes when the house is full is turned away before anything of the request is read, so that turning away stays
cheap and those inside are answered in time. It knows nothing of what is asked. Plain ASGI: a middleware of Starlette's
own kind costs as much as the rest of a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recjax.core.errors import RequestError
from recjax.serve.metrics import Metrics

T = TypeVar("T")

_log = logging.getLogger("recjax.serve")


class Gate:
    """ASGI middleware that lets at most `limit` requests to `limited` paths in at a time and counts all of them."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, paths: Collection[str], limited: Collection[str], limit: int
    ) -> None:
        """`paths` are those that are counted under their own name."""
        self._app, self._metrics, self._limit, self._inside = app, metrics, limit, 0
        self._paths, self._limited = frozenset(paths), frozenset(limited)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever an application raises becomes a 500 with a reason."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, path, status = time.perf_counter(), scope["path"], 0
        limited = path in self._limited

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if limited and self._inside >= self._limit:
            await busy_response()(scope, receive, noting)
        else:
            self._inside += limited
            try:
                await self._app(scope, receive, noting)
            except Exception:
                _log.exception("%s failed", path)
                if status:
                    raise  # half of an answer is out
                await error_response(500, "the server failed to answer", mend="the server's log says more")(
                    scope, receive, noting
                )
            finally:
                self._inside -= limited
        self._metrics.request(path if path in self._paths else "other", status, time.perf_counter() - start)


def busy(what: str = "too many requests are waiting") -> RequestError:
    """The refusal of a server that has enough to do."""
    return RequestError(what, status=503, mend="try again in a second")


def busy_response() -> JSONResponse:
    """`busy` as it is sent."""
    error = busy()
    return error_response(error.status, error.what, mend=error.mend)


async def in_time(answer: Awaitable[T], timeout: float) -> T:
    """Wait for an answer for at most `timeout` seconds, then give it up with a `RequestError` 503."""
    try:
        return await asyncio.wait_for(answer, timeout)
    except TimeoutError:
        raise busy(f"there was no answer within {timeout:g} s") from None


async def read(request: Request, *, limit: int, timeout: float) -> bytes:
    """The body; raises `RequestError` as soon as it is longer than `limit` bytes (413), or comes too slowly (408)."""
    too_large = RequestError(
        "the body is too large", status=413, expected=f"at most {limit} bytes", mend="send the most recent events"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError("the body did not come in time", status=408, expected=f"within {timeout:g} s") from None
    except ClientDisconnect:
        raise RequestError("the caller went away", status=400) from None
    return bytes(body)


def error_response(status: int, what: str, **more: str) -> JSONResponse:
    """A refusal or failure as JSON; one that asks for patience says how long."""
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": {"what": what, **{k: v for k, v in more.items() if v}}}, status, headers)


# What every question may get besides its answer, for /docs and whoever reads the OpenAPI.
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["what"],
            "properties": {name: {"type": "string"} for name in ("what", "where", "expected", "mend")},
        }
    },
}
_REASONS = {
    400: "not JSON",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    422: "not in the right form, or nothing that the model can answer",
    503: "too much to do: try again after Retry-After seconds",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": words, "content": {"application/json": {"schema": _ERROR}}}
    for status, words in _REASONS.items()
}
