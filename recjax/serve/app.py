"""The HTTP service over exported bundles.

    POST /v1/recommend  {"user_history": [ids, oldest first], "k": 10, "exclude_seen": true, "model": name}
                        and for models that read times "history_time": [seconds since 1970], "time": now by default
    GET  /v1/models     what is served
    GET  /healthz       200 once every shape is compiled
    GET  /metrics       Prometheus text

A bad request gets a 4xx and says why; 5xx is kept for the server's own trouble. An item id that the vocabulary does
not have is read as an unknown event, as in training, and counted in the answer. A history without a single known
item among the events the model reads (an empty one above all) has no defined answer and gets a 422: the caller, who
knows what else is on the page, decides what a stranger sees. Fewer than `k` items come back only when the catalogue
has no more.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import recjax
from recjax.core.errors import BundleError, RequestError
from recjax.serve import request as requests
from recjax.serve.batching import Answer, Batcher
from recjax.serve.bundle import Bundle
from recjax.serve.features import Encoded
from recjax.serve.metrics import CONTENT_TYPE, Metrics

RECOMMEND, MODELS, HEALTH, METRICS = PATHS = ("/v1/recommend", "/v1/models", "/healthz", "/metrics")
MAX_BODY = 1 << 20

_log = logging.getLogger("recjax.serve")


def create_app(
    bundles: Sequence[Bundle],
    *,
    max_batch: int = 32,
    max_wait: float = 0.002,
    max_queue: int = 1024,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The app that serves `bundles`; requests that name no model go to the first.

    `max_wait` (seconds) and `max_batch` bound how requests are put together, `max_queue` how many may wait before
    503, `max_body` (bytes) what is read before 413. Raises `BundleError` for no bundles or two of one name.
    """
    named = {bundle.name: bundle for bundle in bundles}
    if not bundles or len(named) != len(bundles):
        raise BundleError(
            "bundles need different names",
            where=", ".join(f"{b.path}: {b.name}" for b in bundles) or "no bundle",
            mend="export with another --name",
        )
    metrics = Metrics()
    batchers = {
        name: Batcher(
            bundle,
            max_batch=max_batch,
            max_wait=max_wait,
            max_queue=max_queue,
            on_batch=lambda size, seconds, name=name: metrics.batch(name, size, seconds),
        )
        for name, bundle in named.items()
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for name, bundle in named.items():
            start = time.perf_counter()
            shapes = await run_in_threadpool(batchers[name].warm_up)
            _log.info("%s: %d shapes compiled in %.1f s", name, shapes, time.perf_counter() - start)
            metrics.model(name, bundle.manifest["step"], bundle.manifest["manifest_hash"])
            await batchers[name].start()
        yield
        for batcher in batchers.values():
            await batcher.stop()

    app = FastAPI(title="recjax", version=recjax.__version__, lifespan=lifespan)
    _add_errors(app)

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception:
            _log.exception("%s failed", request.url.path)
            response = _error(500, "the server failed to answer", mend="the server's log says more")
        path = request.url.path if request.url.path in PATHS else "other"
        metrics.request(path, response.status_code, time.perf_counter() - start)
        return response

    body = {"required": True, "content": {"application/json": {"schema": requests.SCHEMA}}}

    @app.post(RECOMMEND, openapi_extra={"requestBody": body})
    async def recommend(request: Request) -> JSONResponse:
        """The best items for a user history."""
        question = requests.parse(await _read(request, max_body))
        bundle = _choose(named, question.model)
        if not 1 <= question.k <= bundle.max_k:
            raise RequestError(f"k is {question.k}", where="k", expected=f"1 to {bundle.max_k}")
        encoded = bundle.encode(question.user_history, question.history_time, question.time)
        metrics.history(bundle.name, len(question.user_history), encoded.unknown)
        if not encoded.is_known:
            raise _stranger(bundle, question, encoded)
        answer = await batchers[bundle.name].submit(encoded, exclude_seen=question.exclude_seen)
        return JSONResponse(_describe(bundle, question, encoded, answer))

    @app.get(MODELS)
    async def models() -> JSONResponse:
        """What is served."""
        return JSONResponse({"models": [_facts(bundle) for bundle in bundles]})

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        """The server answers."""
        return JSONResponse({"status": "ok"})

    @app.get(METRICS)
    async def show_metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return app


def _choose(named: dict[str, Bundle], name: str) -> Bundle:
    if name and name not in named:
        raise RequestError("there is no such model", status=404, where="model", expected="one of: " + ", ".join(named))
    return named[name] if name else next(iter(named.values()))


def _stranger(bundle: Bundle, question: requests.Question, encoded: Encoded) -> RequestError:
    events = len(question.user_history)
    return RequestError(
        "user_history is empty" if not events else "no item of user_history is known to the model",
        where=f"user_history: {events} items, {encoded.unknown} unknown",
        expected=f"a known item among the last {bundle.history_length}",
        mend="answer strangers without this model, for example with what is popular",
    )


def _describe(bundle: Bundle, question: requests.Question, encoded: Encoded, answer: Answer) -> dict[str, Any]:
    there = np.isfinite(answer.scores)
    rows, scores = answer.rows[there][: question.k], answer.scores[there][: question.k]
    items = zip(bundle.vocab.decode(rows), rows.tolist(), scores.tolist(), strict=True)
    return {
        "items": [{"item_id": item, "title": bundle.titles[row], "score": score} for item, row, score in items],
        "model": bundle.name,
        "step": bundle.manifest["step"],
        "unknown_items": encoded.unknown,
    }


def _facts(bundle: Bundle) -> dict[str, Any]:
    fields = ("name", "recipe", "step", "max_k", "history_length", "num_items", "vocabulary_hash", "schema_hash")
    return {**{f: bundle.manifest[f] for f in fields}, "created": bundle.manifest["created"]}


async def _read(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is longer than `limit` bytes."""
    too_large = RequestError(
        "the body is too large", status=413, expected=f"at most {limit} bytes", mend="send the most recent events"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise RequestError("the caller went away", status=400) from None
    return bytes(body)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return _error(error.status, error.what, where=error.where, expected=error.expected, mend=error.mend)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> JSONResponse:
        expected = {404: "one of: " + ", ".join(PATHS), 405: (error.headers or {}).get("Allow", "")}
        response = _error(error.status_code, str(error.detail), expected=expected.get(error.status_code, ""))
        response.headers.update(error.headers or {})
        return response


def _error(status: int, what: str, **more: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": {"what": what, **{k: v for k, v in more.items() if v}}}, status, headers)
