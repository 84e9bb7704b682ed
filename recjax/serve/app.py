"""The HTTP service over exported bundles.

    POST /v1/recommend  {"user_history": [ids, oldest first], "k": 10, "exclude_seen": true, "model": name}
                        and for models that read times "history_time": [seconds since 1970], "time": now by default
    POST /v1/search     {"query": text, "k": 10, "model": name}
                        both take "filter": {facet: value or [values]}
    POST /v1/score      {"candidates": [{field: text}], "history": [{"item": text, "action": text}], "profile": [text],
                         "instruction": {field: text}, "task": name, "model": name}; score bundles alone
    GET  /v1/models     what is served: names, sizes, facets; tasks of score bundles and their fields
    GET  /v1/users      sample users, where a bundle has some; ?model=name
    GET  /              a page to try them on
    GET  /healthz       200 once every shape is compiled
    GET  /metrics       Prometheus text

A bad request gets a 4xx and says why; 5xx is kept for the server's own trouble. An item id that the vocabulary does
not have is read as an unknown event, as in training, and counted in the answer. A history without a single known
item among the events the model reads (an empty one above all) has no defined answer and gets a 422: the caller, who
knows what else is on the page, decides what a stranger sees. Likewise a query in which the text model finds nothing.
Fewer than `k` items come back only when the catalogue, or what the filter leaves of it, has no more.
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
from recjax.serve.desk import Desk
from recjax.serve.features import Encoded
from recjax.serve.metrics import CONTENT_TYPE, Metrics
from recjax.serve.page import HEADERS, PAGE
from recjax.serve.score_bundle import ScoreBundle
from recjax.serve.score_request import SCORE_SCHEMA, parse_score

RECOMMEND, SEARCH, SCORE = ("/v1/recommend", "/v1/search", "/v1/score")
MODELS, USERS = ("/v1/models", "/v1/users")
HEALTH, METRICS, HOME = ("/healthz", "/metrics", "/")
PATHS = (RECOMMEND, SEARCH, SCORE, MODELS, USERS, HEALTH, METRICS, HOME)
MAX_BODY = 1 << 20

Asked = requests.Question | requests.SearchQuestion

_log = logging.getLogger("recjax.serve")


def create_app(
    bundles: Sequence[Bundle],
    *,
    scorers: Sequence[ScoreBundle] = (),
    max_batch: int = 32,
    max_wait: float = 0.002,
    max_queue: int = 1024,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The app that serves `bundles`; requests that name no model go to the first that was trained to answer them.

    `scorers` are bundles that score candidates.

    `max_wait` (seconds) and `max_batch` bound how requests are put together, `max_queue` how many may wait before
    503, `max_body` (bytes) what is read before 413. Raises `BundleError` for no bundles or two of one name.
    """
    named, every = {bundle.name: bundle for bundle in bundles}, [*bundles, *scorers]
    if not every or len({bundle.name for bundle in every}) != len(every):
        raise BundleError(
            "bundles need different names",
            where=", ".join(f"{b.path}: {b.name}" for b in every) or "no bundle",
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

    desks = {
        bundle.name: Desk(
            bundle,
            max_queue=max_queue,
            on_batch=lambda size, seconds, name=bundle.name: metrics.batch(name, size, seconds),
        )
        for bundle in scorers
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for name, bundle in named.items():
            start = time.perf_counter()
            shapes = await run_in_threadpool(batchers[name].warm_up)
            _log.info("%s: %d shapes compiled in %.1f s", name, shapes, time.perf_counter() - start)
            metrics.model(name, bundle.manifest["step"], bundle.manifest["manifest_hash"])
            await batchers[name].start()
        for name, desk in desks.items():
            shapes = await run_in_threadpool(desk.bundle.warm_up)
            _log.info("%s: %d shapes compiled", name, shapes)
            metrics.model(name, desk.bundle.manifest["step"], desk.bundle.manifest["manifest_hash"])
        yield
        for batcher in batchers.values():
            await batcher.stop()
        for desk in desks.values():
            desk.stop()

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

    async def answer_of(
        bundle: Bundle, question: Asked, encoded: Encoded, *, exclude_seen: bool = True
    ) -> dict[str, Any]:
        if not 1 <= question.k <= bundle.max_k:
            raise RequestError(f"k is {question.k}", where="k", expected=f"1 to {bundle.max_k}")
        allowed = bundle.allowed(question.filter)
        answer = await batchers[bundle.name].submit(encoded, exclude_seen=exclude_seen, allowed=allowed)
        return _describe(bundle, question.k, answer)

    @app.post(RECOMMEND, openapi_extra=_body(requests.SCHEMA))
    async def recommend(request: Request) -> JSONResponse:
        """The best items for a user history."""
        question = requests.parse(await _read(request, max_body))
        bundle = _choose(named, question.model, lambda bundle: bundle.recommends)
        if not bundle.recommends:
            raise RequestError(f"{bundle.name} was trained on queries alone", where="model", mend=f"ask {SEARCH}")
        encoded = bundle.encode(question.user_history, question.history_time, question.time)
        metrics.history(bundle.name, len(question.user_history), encoded.unknown)
        if not encoded.is_known:
            raise _stranger(bundle, question, encoded)
        answer = await answer_of(bundle, question, encoded, exclude_seen=question.exclude_seen)
        return JSONResponse({**answer, "unknown_items": encoded.unknown})

    @app.post(SEARCH, openapi_extra=_body(requests.SEARCH_SCHEMA))
    async def search(request: Request) -> JSONResponse:
        """The best items for a query."""
        question = requests.parse_search(await _read(request, max_body))
        bundle = _choose(named, question.model, lambda bundle: bundle.searches)
        return JSONResponse(await answer_of(bundle, question, bundle.encode_query(question.query)))

    @app.post(SCORE, openapi_extra=_body(SCORE_SCHEMA))
    async def score(request: Request) -> JSONResponse:
        """How likely each answer is for each of some candidates."""
        question = parse_score(await _read(request, max_body))
        if not desks or (question.model and question.model not in desks):
            raise RequestError(
                "there is no such model" if desks else "no model here scores candidates",
                status=404,
                where="model",
                expected="one of: " + (", ".join(desks) or "none"),
            )
        desk = desks[question.model] if question.model else next(iter(desks.values()))
        return JSONResponse(await desk.score(question))

    @app.get(MODELS)
    async def models() -> JSONResponse:
        """What is served."""
        return JSONResponse({"models": [*map(_facts, bundles), *(desk.facts() for desk in desks.values())]})

    @app.get(USERS)
    async def users(model: str = "") -> JSONResponse:
        """Sample users to try a model on: their histories with titles, oldest first."""
        bundle = _choose(named, model, lambda bundle: bool(bundle.users))
        return JSONResponse({"model": bundle.name, "users": [_with_titles(bundle, user) for user in bundle.users]})

    @app.get(HOME, include_in_schema=False)
    async def home() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        """The server answers."""
        return JSONResponse({"status": "ok"})

    @app.get(METRICS)
    async def show_metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return app


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _choose(named: dict[str, Bundle], name: str, can: Callable[[Bundle], bool]) -> Bundle:
    """The bundle of that name; without a name the first that `can` answer, or else the first."""
    if not named:
        raise RequestError("no model here recommends", status=404, mend=f"ask {SCORE}")
    if name and name not in named:
        raise RequestError("there is no such model", status=404, where="model", expected="one of: " + ", ".join(named))
    return named[name] if name else next(filter(can, named.values()), next(iter(named.values())))


def _stranger(bundle: Bundle, question: requests.Question, encoded: Encoded) -> RequestError:
    events = len(question.user_history)
    return RequestError(
        "user_history is empty" if not events else "no item of user_history is known to the model",
        where=f"user_history: {events} items, {encoded.unknown} unknown",
        expected=f"a known item among the last {bundle.history_length}",
        mend="answer strangers without this model, for example with what is popular",
    )


def _describe(bundle: Bundle, k: int, answer: Answer) -> dict[str, Any]:
    there = np.isfinite(answer.scores)
    rows, scores = answer.rows[there][:k], answer.scores[there][:k]
    items = zip(bundle.vocab.decode(rows), rows.tolist(), scores.tolist(), strict=True)
    return {
        "items": [{"item_id": item, "title": bundle.titles[row], "score": score} for item, row, score in items],
        "model": bundle.name,
        "step": bundle.manifest["step"],
    }


def _facts(bundle: Bundle) -> dict[str, Any]:
    fields = ("name", "recipe", "step", "max_k", "history_length", "num_items", "vocabulary_hash", "schema_hash")
    return {
        **{f: bundle.manifest[f] for f in fields},
        "recommends": bundle.recommends,
        "searches": bundle.searches,
        "facets": bundle.facets.shown(),
        "sample_users": len(bundle.users),
        "created": bundle.manifest["created"],
    }


def _with_titles(bundle: Bundle, user: dict[str, Any]) -> dict[str, Any]:
    rows = bundle.vocab.encode(user["history"]).tolist()
    history = [{"item_id": item, "title": bundle.titles[row]} for item, row in zip(user["history"], rows, strict=True)]
    return {**user, "history": history}


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
