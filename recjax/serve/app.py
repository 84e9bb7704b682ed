"""The HTTP service over exported bundles.

    POST /v1/recommend  {"user_history": [ids, oldest first], "k": 10, "exclude_seen": true, "model": name}
                        and for models that read times "history_time": [seconds since 1970], "time": now by default
    POST /v1/search     {"query": text, "k": 10, "model": name}
                        both take "filter": {facet: value or [values]}
    POST /v1/score      {"candidates": [{field: text}], "history": [{"item": text, "action": text}], "profile": [text],
                         "instruction": {field: text}, "task": name, "model": name}; score bundles alone
    POST /v1/rank       {"context": {column: value}, "candidates": [{column: value}], "k": 10, "head": name,
                         "model": name}; rank bundles alone
    GET  /v1/models     what is served: names, sizes, facets; tasks of score bundles and their fields
    GET  /v1/users      sample users, where a bundle has some; ?model=name
    GET  /              a page to try them on
    GET  /healthz       200 once every shape is compiled
    GET  /metrics       Prometheus text

A bad request gets a 4xx and says why; 5xx is kept for the server's own trouble. 503 with Retry-After says that too many
wait or that an answer did not come in time, 408 that a body did not. An item id that the vocabulary does
not have is read as an unknown event, as in training, and counted in the answer. A history without a single known
item among the events the model reads (an empty one above all) has no defined answer and gets a 422: the caller, who
knows what else is on the page, decides what a stranger sees. Likewise a query in which the text model finds nothing.
Fewer than `k` items come back only when the catalogue, or what the filter leaves of it, has no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import recjax
from recjax.core.errors import RequestError
from recjax.serve import request as requests
from recjax.serve.bundle import Bundle
from recjax.serve.desk import Desk
from recjax.serve.features import Encoded
from recjax.serve.gate import REFUSALS, Gate, error_response, read
from recjax.serve.item_desk import Found, ItemDesk, Wanted
from recjax.serve.kinds import load_bundle
from recjax.serve.metrics import CONTENT_TYPE, Metrics
from recjax.serve.page import HEADERS, PAGE
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_desk import RankDesk
from recjax.serve.rank_request import RANK_SCHEMA, parse_rank
from recjax.serve.score_bundle import ScoreBundle
from recjax.serve.score_desk import ScoreDesk
from recjax.serve.score_request import SCORE_SCHEMA, parse_score
from recjax.serve.shelf import Shelf
from recjax.serve.stored import Stored

RECOMMEND, SEARCH, SCORE, RANK = ("/v1/recommend", "/v1/search", "/v1/score", "/v1/rank")
MODELS, USERS = ("/v1/models", "/v1/users")
HEALTH, METRICS, HOME = ("/healthz", "/metrics", "/")
PATHS = (RECOMMEND, SEARCH, SCORE, RANK, MODELS, USERS, HEALTH, METRICS, HOME)
WORK = (RECOMMEND, SEARCH, SCORE, RANK)  # what a model has to be called for
RECOMMENDS = "recommends"  # what is said where nobody does
MAX_BODY = 1 << 20

Asked = requests.Question | requests.SearchQuestion
D = TypeVar("D", bound=Desk)


def create_app(
    bundles: Sequence[Stored],
    *,
    max_batch: int = 32,
    max_wait: float = 0.002,
    max_queue: int = 1024,
    max_body: int = MAX_BODY,
    timeout: float = 10.0,
    roots: Mapping[str, str | os.PathLike[str]] | None = None,
    watch: float = 0.0,
) -> FastAPI:
    """The app that serves `bundles`; requests that name no model go to the first that was trained to answer them.

    `max_wait` (seconds) and `max_batch` bound how requests are put together, `max_queue` how many may wait before
    503, `timeout` (seconds) how long each may, `max_body` (bytes) what is read before 413. `roots` says by name where
    newer versions of a bundle appear (`recjax.serve.shelf`), which are looked for every `watch` seconds (0: never) and
    by `app.state.shelf.refresh()`. Raises `BundleError` for no bundles or two of one name.
    """
    metrics = Metrics()

    def desk_of(bundle: Stored) -> Desk:
        bounds: dict[str, Any] = {"max_queue": max_queue, "timeout": timeout}
        bounds["on_batch"] = functools.partial(metrics.batch, bundle.name)
        if isinstance(bundle, ScoreBundle):
            return ScoreDesk(bundle, **bounds)
        if isinstance(bundle, RankBundle):
            return RankDesk(bundle, **bounds)
        assert isinstance(bundle, Bundle)
        return ItemDesk(bundle, max_batch=max_batch, max_wait=max_wait, **bounds)

    shelf = Shelf(
        [desk_of(bundle) for bundle in bundles],
        load=lambda path: desk_of(load_bundle(path)),
        roots=roots,
        on_served=metrics.served,
        on_refused=metrics.refused,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await shelf.open()
        watching = asyncio.create_task(shelf.watch(watch)) if watch else None
        yield
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
        await shelf.close()

    app = FastAPI(title="recjax", version=recjax.__version__, lifespan=lifespan)
    app.state.shelf, app.state.draining = shelf, False
    app.add_middleware(Gate, metrics=metrics, paths=PATHS, limited=WORK, limit=max_queue + max_batch)
    _add_errors(app)

    async def body_of(request: Request) -> bytes:
        return await read(request, limit=max_body, timeout=timeout)

    async def answer_of(
        desk: ItemDesk, question: Asked, encoded: Encoded, *, exclude_seen: bool = True
    ) -> dict[str, Any]:
        bundle = desk.bundle
        if not 1 <= question.k <= bundle.max_k:
            raise RequestError(f"k is {question.k}", where="k", expected=f"1 to {bundle.max_k}")
        found = await desk.ask(Wanted(encoded, exclude_seen, bundle.allowed(question.filter)))
        return _describe(bundle, question.k, found)

    @app.post(RECOMMEND, openapi_extra=_body(requests.SCHEMA), responses=REFUSALS)
    async def recommend(request: Request) -> JSONResponse:
        """The best items for a user history."""
        question = requests.parse(await body_of(request))
        desk = _choose(shelf.of(ItemDesk), question.model, RECOMMENDS, lambda desk: desk.bundle.recommends)
        bundle = desk.bundle
        if not bundle.recommends:
            raise RequestError(f"{bundle.name} was trained on queries alone", where="model", mend=f"ask {SEARCH}")
        encoded = bundle.encode(question.user_history, question.history_time, question.time)
        metrics.history(bundle.name, len(question.user_history), encoded.unknown)
        if not encoded.is_known:
            raise _stranger(bundle, question, encoded)
        answer = await answer_of(desk, question, encoded, exclude_seen=question.exclude_seen)
        return JSONResponse({**answer, "unknown_items": encoded.unknown})

    @app.post(SEARCH, openapi_extra=_body(requests.SEARCH_SCHEMA), responses=REFUSALS)
    async def search(request: Request) -> JSONResponse:
        """The best items for a query."""
        question = requests.parse_search(await body_of(request))
        desk = _choose(shelf.of(ItemDesk), question.model, RECOMMENDS, lambda desk: desk.bundle.searches)
        return JSONResponse(await answer_of(desk, question, desk.bundle.encode_query(question.query)))

    @app.post(SCORE, openapi_extra=_body(SCORE_SCHEMA), responses=REFUSALS)
    async def score(request: Request) -> JSONResponse:
        """How likely each answer is for each of some candidates."""
        question = parse_score(await body_of(request))
        desk = _choose(shelf.of(ScoreDesk), question.model, "scores candidates")
        return JSONResponse(await desk.ask(question))

    @app.post(RANK, openapi_extra=_body(RANK_SCHEMA), responses=REFUSALS)
    async def rank(request: Request) -> JSONResponse:
        """Candidates in order, with what every head says of each: a probability, or a number."""
        question = parse_rank(await body_of(request))
        desk = _choose(shelf.of(RankDesk), question.model, "ranks candidates")
        return JSONResponse(await desk.ask(question))

    @app.get(MODELS)
    async def models() -> JSONResponse:
        """What is served."""
        return JSONResponse({"models": shelf.facts()})

    @app.get(USERS)
    async def users(model: str = "") -> JSONResponse:
        """Sample users to try a model on: their histories with titles, oldest first."""
        bundle = _choose(shelf.of(ItemDesk), model, RECOMMENDS, lambda desk: bool(desk.bundle.users)).bundle
        return JSONResponse({"model": bundle.name, "users": [_with_titles(bundle, user) for user in bundle.users]})

    @app.get(HOME, include_in_schema=False)
    async def home() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        """The server answers; 503 from when it was told to stop, while it still does."""
        if app.state.draining:
            return error_response(503, "the server is about to stop", mend="ask another one")
        return JSONResponse({"status": "ok"})

    @app.get(METRICS)
    async def show_metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return app


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _choose(desks: dict[str, D], name: str, does: str, can: Callable[[D], bool] = lambda desk: True) -> D:
    """The desk of that name; without a name the first that `can` answer, or else the first of those that `does`."""
    if not desks:
        raise RequestError(f"no model here {does}", status=404, where="model", mend=f"{MODELS} lists what is served")
    if name and name not in desks:
        known = ", ".join(desks)
        raise RequestError("there is no such model", status=404, where="model", expected=f"one of: {known}")
    return desks[name] if name else next(filter(can, desks.values()), next(iter(desks.values())))


def _stranger(bundle: Bundle, question: requests.Question, encoded: Encoded) -> RequestError:
    events = len(question.user_history)
    return RequestError(
        "user_history is empty" if not events else "no item of user_history is known to the model",
        where=f"user_history: {events} items, {encoded.unknown} unknown",
        expected=f"a known item among the last {bundle.history_length}",
        mend="answer strangers without this model, for example with what is popular",
    )


def _describe(bundle: Bundle, k: int, found: Found) -> dict[str, Any]:
    there = np.isfinite(found.scores)
    rows, scores = found.rows[there][:k], found.scores[there][:k]
    items = zip(bundle.vocab.decode(rows), rows.tolist(), scores.tolist(), strict=True)
    return {
        "items": [{"item_id": item, "title": bundle.titles[row], "score": score} for item, row, score in items],
        **bundle.origin,
    }


def _with_titles(bundle: Bundle, user: dict[str, Any]) -> dict[str, Any]:
    rows = bundle.vocab.encode(user["history"]).tolist()
    history = [{"item_id": item, "title": bundle.titles[row]} for item, row in zip(user["history"], rows, strict=True)]
    return {**user, "history": history}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return error_response(error.status, error.what, where=error.where, expected=error.expected, mend=error.mend)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> JSONResponse:
        expected = {404: "one of: " + ", ".join(PATHS), 405: (error.headers or {}).get("Allow", "")}
        response = error_response(error.status_code, str(error.detail), expected=expected.get(error.status_code, ""))
        response.headers.update(error.headers or {})
        return response
