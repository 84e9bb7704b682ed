"""Reading one request: bytes to a checked question, or a `RequestError` that says what to change.

The body is parsed here rather than by a model class, because every odd body (numbers that JSON does not have, text
that is not UTF-8, nesting without end, integers of a million digits) must end as a 4xx with a reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from recjax.core.errors import RequestError

MAX_HISTORY = 10_000  # events in one request
DEFAULT_K = 10

MAX_TEXT = 10_000  # characters of one text
MAX_CANDIDATES = 1000

# Shown by /docs; `parse` and `parse_search` are what counts.
_SHARED: dict[str, Any] = {
    "k": {"type": "integer", "minimum": 1, "default": DEFAULT_K, "description": "items wanted, at most max_k"},
    "filter": {
        "type": "object",
        "additionalProperties": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "description": "facet: a value, or several of which any will do; /v1/models lists the facets",
    },
    "model": {"type": "string", "description": "name of a served bundle; the first that answers this when left out"},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["user_history"],
    "additionalProperties": False,
    "properties": {
        "user_history": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_HISTORY,
            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "description": "item ids, oldest first",
        },
        "history_time": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "seconds since 1970 of each event of user_history, for models that read them",
        },
        "time": {"type": "integer", "description": "seconds since 1970 when the answer is wanted; now when left out"},
        "exclude_seen": {"type": "boolean", "default": True, "description": "leave out what is in user_history"},
        **_SHARED,
    },
}
SEARCH_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["query"],
    "additionalProperties": False,
    "properties": {
        "query": {"type": "string", "minLength": 1, "maxLength": MAX_TEXT, "description": "what is searched for"},
        **_SHARED,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What to recommend to a history, in the right form; `k` and `filter` are not yet compared with the bundle."""

    user_history: list[int | str]
    history_time: list[int] | None = None
    time: int | None = None
    exclude_seen: bool = True
    k: int = DEFAULT_K
    filter: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    model: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchQuestion:
    """What to find for a query, likewise."""

    query: str
    k: int = DEFAULT_K
    filter: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    model: str = ""


def parse(body: bytes) -> Question:
    """The question in `body`; raises `RequestError` with status 400 (not JSON) or 422 (not the right form)."""
    value = object_of(body, SCHEMA, "a list of item ids, oldest first")
    _check_history(value)
    _check_times(value, len(value["user_history"]))
    if not isinstance(value.get("exclude_seen", True), bool):
        raise wrong("exclude_seen", value["exclude_seen"], "true or false")
    return Question(**_check_shared(value))


def parse_search(body: bytes) -> SearchQuestion:
    """The query in `body`, as `parse`."""
    value = object_of(body, SEARCH_SCHEMA, "text")
    check_text("query", value["query"])
    return SearchQuestion(**_check_shared(value))


def object_of(body: bytes, schema: Mapping[str, Any], expected: str) -> dict[str, Any]:
    """The fields in `body`, each of them known; `expected` is what the one that must be there holds."""
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error) or type(error).__name__}", status=400) from error
    if not isinstance(value, dict):
        raise wrong("the body", value, "a JSON object")
    unknown = sorted(value.keys() - schema["properties"].keys())
    if unknown:
        fields = ", ".join(schema["properties"])
        raise RequestError(f"unknown field {short(unknown[0])}", where="body", expected=f"only {fields}")
    for name in schema["required"]:
        if name not in value:
            raise RequestError(f"{name} is missing", where="body", expected=expected)
    return value


def candidates_of(value: Mapping[str, Any]) -> list[Any]:
    """The list of candidates of a question."""
    found = value["candidates"]
    if not isinstance(found, list) or not found:
        raise wrong("candidates", found, f"a list of 1 to {MAX_CANDIDATES} candidates")
    if len(found) > MAX_CANDIDATES:
        raise RequestError(
            f"there are {len(found)} candidates",
            where="candidates",
            expected=f"at most {MAX_CANDIDATES}",
            mend="ask in several requests, or retrieve fewer",
        )
    return found


def check_text(where: str, value: Any) -> None:
    """Raises `RequestError` for anything but a text of bearable length that can be written in UTF-8."""
    if not isinstance(value, str):
        raise wrong(where, value, "text")
    if len(value) > MAX_TEXT:
        raise RequestError(f"a text of {len(value)} characters", where=where, expected=f"at most {MAX_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(where, value, "text that has a form in UTF-8") from None


def _check_history(value: Mapping[str, Any]) -> None:
    history = value["user_history"]
    if not isinstance(history, list):
        raise wrong("user_history", history, "a list of item ids, oldest first")
    if len(history) > MAX_HISTORY:
        raise RequestError(
            f"user_history has {len(history)} items",
            where="user_history",
            expected=f"at most {MAX_HISTORY}",
            mend="send the most recent ones",
        )
    for i, item in enumerate(history):
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise wrong(f"user_history[{i}]", item, "an item id: text or a whole number")


def _check_shared(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that all questions have, checked, and with lists for the values of a filter."""
    k = value.get("k", DEFAULT_K)
    if isinstance(k, bool) or not isinstance(k, int):
        raise wrong("k", k, "a whole number")
    if not isinstance(value.get("model", ""), str):
        raise wrong("model", value["model"], "the name of a served bundle")
    wanted = value.get("filter", {})
    if not isinstance(wanted, dict):
        raise wrong("filter", wanted, "an object: facet and value")
    lists = {name: [one] if isinstance(one, str) else one for name, one in wanted.items()}
    for name, values in lists.items():
        if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
            raise wrong(f"filter.{short(name)}", wanted[name], "a value, or a list of at least one; values are text")
    return {**value, "filter": lists}


def _check_times(value: Mapping[str, Any], events: int) -> None:
    times = value.get("history_time", [0] * events)
    if not isinstance(times, list) or len(times) != events:
        raise RequestError(
            "history_time does not go with user_history",
            where="history_time",
            expected=f"a list of {events} times, one for each event",
        )
    named = [*((f"history_time[{i}]", time) for i, time in enumerate(times)), ("time", value.get("time", 0))]
    for name, time in named:
        if isinstance(time, bool) or not isinstance(time, int) or abs(time) >= 2**62:
            raise wrong(name, time, "seconds since 1970, a whole number")


def wrong(what: str, value: Any, expected: str) -> RequestError:
    """The error of a field that is of another kind than `expected`."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    kind = kinds.get(type(value), "null")
    shown = "" if isinstance(value, dict | list) else f" ({short(value)})"
    return RequestError(f"{what} is {kind}{shown}", where=what, expected=expected)


def short(value: Any) -> str:
    """JSON of a value, cut; ASCII only, so that it can always be sent back."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
